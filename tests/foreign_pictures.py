"""Pictures as other programs write them, and what a Request takes over from each.

Each writer here follows the source of its program's writer. What is expected follows from what the program does with
the setting. `ignored` are the names of all settings that are told as not taken over.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
FOX = "a red fox in snow"


class Foreign(NamedTuple):
    """A picture of another program."""

    name: str  # the program, and what is special
    version: str
    data: bytes
    fields: Mapping[str, Any]  # what a Request takes over, empty texts left out
    ignored: Sequence[str] = ()
    values: Mapping[str, Any] = {}  # of some of the ignored


# Files ---------------------------------------------------------------------------------------------------------------


def save(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def png(**texts: str) -> bytes:
    """Pillow's add_text: Latin-1 where it holds the text, else iTXt."""
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key.replace("xmp", "XML:com.adobe.xmp"), value)
    return save("PNG", pnginfo=info)


def png_of_bytes(key: str, text: str) -> bytes:
    """stable-diffusion.cpp: UTF-8 in a tEXt chunk, behind the header."""
    body = b"tEXt" + key.encode() + b"\0" + text.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = save("PNG")
    return data[:33] + chunk + data[33:]


def jpeg_comment(text: str) -> bytes:
    """stable-diffusion.cpp: a COM segment with a name and a text, both ended by zero."""
    body = b"parameters\0" + text.encode() + b"\0"
    data = save("JPEG")
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(body) + 2) + body + data[2:]


def with_exif(kind: str, tags: Mapping[int, Any] | None = None, comment: bytes | None = None) -> bytes:
    exif = Image.Exif()
    for tag, value in (tags or {}).items():
        exif[tag] = value
    if comment is not None:
        exif.get_ifd(0x8769)[0x9286] = comment
    return save(kind, exif=exif.tobytes())


def unicode(text: str, order: str = "be") -> bytes:
    """piexif writes UTF-16 big-endian, ImageSharp little-endian; neither a byte order mark."""
    return b"UNICODE\0" + text.encode(f"utf-16-{order}")


# A1111, Forge, SD.Next -----------------------------------------------------------------------------------------------


def infotext(prompt: str, negative: str | None, pairs: Mapping[str, Any]) -> str:
    """A1111's create_infotext: a value with a comma, colon or line break is JSON."""

    def quote(value: Any) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",\n:") else text

    line = ", ".join(f"{key}: {quote(value)}" for key, value in pairs.items() if value is not None)
    return f"{prompt}{'' if negative is None else f'{chr(10)}Negative prompt: {negative}'}\n{line}".strip()


def forge(prompt: str, model: str, distilled: float | None, negative: str | None = None, **more: Any) -> str:
    first = {
        "Steps": 20,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,
        "Distilled CFG Scale": distilled,
    }
    rest = {"Seed": 1234567890, "Size": "896x1152", "Model hash": "4610115bb0", "Model": model}
    version = {"Version": "f2.0.1v1.10.1-previous-660-g4f825bc"}
    return infotext(prompt, negative, first | rest | {k.replace("_", " "): v for k, v in more.items()} | version)


FORGED = {
    "steps": 20, "solver": "euler", "schedule": "simple", "seed": 1234567890, "width": 896, "height": 1152,
}  # fmt: skip
ODD = '雪中的红狐, "quoted": 6:00\nSteps: 3, Sampler: none, Seed: 5\nthe end'

LOW_BITS = ", Diffusion in Low Bits: bnb-nf4"
MODULES = ", Module 1: clip_l, Module 2: t5xxl_fp16, Module 3: ae"
DREAMS = infotext(
    "portrait of a woman,\n(masterpiece:1.2), [cat|dog]", "lowres,\nbad: hands",
    {"Steps": 30, "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": 7.5, "Seed": 99, "Size": "832x1216",
     "Model hash": "31e35c80fc", "Model": "sd_xl_base_1.0", "Clip skip": 2, "RNG": "CPU", "Version": "v1.10.1"},
)  # fmt: skip


def sdnext(prompt: str, negative: str, template: str = "", **pairs: Any) -> str:
    """SD.Next always has a line for the negative prompt, and one for the prompt before its wildcards were drawn."""
    pairs = {key.replace("_", " "): value for key, value in pairs.items()}
    line = infotext("", None, pairs | {"App": "SD.Next", "Version": "3f2ca3d"})
    return f"{prompt}\nNegative prompt: {negative}{f'{chr(10)}Template: {template}' if template else ''}\n{line}"


SDNEXT_FLUX = sdnext(
    FOX, "", Steps=28, Size="1024x768", Sampler="Euler FlowMatch", Scheduler="FlowMatchEulerDiscreteScheduler",
    Seed=42, CFG_scale=4.5, Pipeline="FluxPipeline", Operations="txt2img",
    Model="Diffusers/black-forest-labs/FLUX.1-dev [0ef5fff789]",
)  # fmt: skip
SDNEXT_TURBO = sdnext(
    "a blue fox", "blurry", "a {blue|red} fox,\nin snow", Steps=9, Size="1024x1024",
    Scheduler="FlowMatchEulerDiscreteScheduler", Seed=7, CFG_scale=1, Pipeline="ZImagePipeline", Operations="txt2img",
    Model="Z-Image-Turbo", Model_hash="abc123",
)  # fmt: skip
SDNEXT_IMG2IMG = sdnext(
    FOX, "", Steps=20, Size="1024x1024", Scheduler="FlowMatchEulerDiscreteScheduler", Seed=7, CFG_scale=4,
    Pipeline="Flux2KleinPipeline", Operations="img2img", Model="FLUX.2-klein-base-4B", Init_image_size="1024x1024",
    Init_image_hash="ab12cd34", Denoising_strength=0.6,
)  # fmt: skip

A1111 = [
    Foreign("Forge: a FLUX.1 dev PNG", "f2.0.1",
            png(parameters=forge('a fox, "quoted", at 6:00', "flux1-dev-bnb-nf4-v2", 3.5) + LOW_BITS),
            FORGED | {"prompt": 'a fox, "quoted", at 6:00', "model": "flux1-dev", "guidance": 3.5},
            ["Diffusion in Low Bits"]),
    Foreign("Forge: LoRAs and modules", "f2.0.1",
            png(parameters=forge(f"{FOX} <lora:fur_v2:0.8><lora:snow:1>", "flux1-dev-Q8_0", 2.2,
                                 Lora_hashes="fur_v2: dead, snow: beef") + MODULES),
            FORGED | {"prompt": FOX, "model": "flux1-dev", "guidance": 2.2},
            ["loras", "Module 1", "Module 2", "Module 3"], {"loras": ["fur_v2:0.8", "snow:1"]}),
    Foreign("Forge: a JPEG whose prompt looks like the settings", "f2.0.1",
            with_exif("JPEG", comment=unicode(forge(ODD, "flux1-dev-fp8", 3.5))),
            FORGED | {"prompt": ODD, "model": "flux1-dev", "guidance": 3.5}),
    Foreign("Forge: a Kontext WebP", "f2.0.1",
            with_exif("WEBP", comment=unicode(forge("make it night", "flux1-dev-kontext_fp8_scaled", 2.5))),
            FORGED | {"prompt": "make it night", "model": "flux1-kontext-dev", "guidance": 2.5}),
    Foreign("Forge: hires fix", "f2.0.1",
            png(parameters=forge(FOX, "flux1-dev", 3.5, Denoising_strength=0.4, Hires_Module_1="Use same choices",
                                 Hires_CFG_Scale=1, Hires_Distilled_CFG_Scale=3.5, Hires_upscale=2, Hires_steps=10,
                                 Hires_upscaler="4x-UltraSharp")),
            FORGED | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5},
            ["Denoising strength", "Hires Module 1", "Hires CFG Scale", "Hires Distilled CFG Scale", "Hires upscale",
             "Hires steps", "Hires upscaler"]),
    Foreign("Forge: img2img with a mask", "f2.0.1",
            png(parameters=forge(FOX, "flux1-dev", 3.5, Denoising_strength=0.75, Mask_blur=4)),
            FORGED | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5, "strength": 0.75, "mask_grow": 8,
                      "mask_blur": 16}, ["mask"]),
    Foreign("A1111: only masked, inverted, filled", "v1.10.1",
            png(parameters=forge(FOX, "flux1-dev", 3.5, Denoising_strength=0.75, Mask_mode="Inpaint not masked",
                                 Mask_blur=4, Inpaint_area="Only masked", Masked_area_padding=48,
                                 Masked_content="fill")),
            FORGED | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5, "strength": 0.75, "mask_grow": 8,
                      "mask_blur": 16, "crop": "48px", "mask_invert": True, "mask_fill": "blur"}, ["mask"]),
    Foreign("Forge: schnell has no distilled guidance", "f2.0.1",
            png(parameters=forge(FOX, "flux1-schnell-fp8", None, "ugly")),
            FORGED | {"prompt": FOX, "negative_prompt": "ugly", "model": "flux1-schnell", "guidance": 1}),
    Foreign("Forge: CFG beside the distilled guidance", "f2.0.1",
            png(parameters=forge(FOX, "flux1-dev", 3.5, "ugly").replace("CFG scale: 1,", "CFG scale: 2.5,", 1)),
            FORGED | {"prompt": FOX, "negative_prompt": "ugly", "model": "flux1-dev", "guidance": 3.5}, ["guidance"],
            {"guidance": "2.5"}),
    Foreign("Forge: a finetune", "f2.0.1", png(parameters=forge(FOX, "pixelwave_flux1_dev_bf16_03", 3.5)),
            FORGED | {"prompt": FOX, "guidance": 1}, ["model", "Distilled CFG Scale"],
            {"model": "pixelwave_flux1_dev_bf16_03"}),
    Foreign("Forge: Fill, ControlNet, a sign with odd words", "f2.0.1",
            png(parameters=forge('a sign: "Negative prompt: none"', "flux1-fill-dev-Q8_0", 30, "fog",
                                 Denoising_strength=1.0, Mask_blur=4, Inpaint_area="Only masked",
                                 ControlNet_0="Module: canny, Model: x [ab], Weight: 1.0")),
            FORGED | {"prompt": 'a sign: "Negative prompt: none"', "negative_prompt": "fog", "model": "flux1-fill-dev",
                      "guidance": 30, "strength": 1, "mask_grow": 8, "mask_blur": 16, "crop": "32px"},
            ["mask", "ControlNet 0"]),
    Foreign("Forge: no prompt", "f2.0.1", png(parameters=forge("", "flux1-dev", 3.5, "fog")),
            FORGED | {"negative_prompt": "fog", "model": "flux1-dev", "guidance": 3.5}),
    Foreign("A1111: SDXL, prompts of several lines", "v1.10.1", png(parameters=DREAMS),
            {"prompt": "portrait of a woman,\n(masterpiece:1.2), [cat|dog]", "negative_prompt": "lowres,\nbad: hands",
             "steps": 30, "solver": "dpmpp_2m", "guidance": 7.5, "seed": 99, "width": 832, "height": 1216},
            ["schedule", "model", "Clip skip", "RNG"], {"schedule": "Karras", "model": "sd_xl_base_1.0"}),
    Foreign("reForge: the same in a little-endian JPEG", "f1.8.1",
            with_exif("JPEG", comment=unicode(DREAMS, "le")),
            {"prompt": "portrait of a woman,\n(masterpiece:1.2), [cat|dog]", "negative_prompt": "lowres,\nbad: hands",
             "steps": 30, "solver": "dpmpp_2m", "guidance": 7.5, "seed": 99, "width": 832, "height": 1216},
            ["schedule", "model", "Clip skip", "RNG"]),
    Foreign("A1111 with Dynamic Prompts: templates behind the settings", "v1.10.1",
            png(parameters=f"{forge(FOX, 'flux1-dev', 3.5)}\nTemplate: a {{red|blue}} fox in snow"),
            FORGED | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5}, ["template"]),
    Foreign("A1111 1.5: solver and schedule in one name", "v1.5.2",
            png(parameters=f"{FOX}\nNegative prompt: ugly\nSteps: 25, Sampler: Euler a, CFG scale: 4.5, Seed: 3, "
                "Size: 768x1024, Model hash: 1a2b3c4d5e, Model: z_image_bf16, Version: v1.5.2"),
            {"prompt": FOX, "negative_prompt": "ugly", "steps": 25, "solver": "euler_ancestral", "guidance": 4.5,
             "seed": 3, "width": 768, "height": 1024, "model": "z-image"}),
    Foreign("SD.Next: FLUX.1 dev, whose CFG scale is the pipeline's guidance", "3f2ca3d", png(parameters=SDNEXT_FLUX),
            {"prompt": FOX, "steps": 28, "width": 1024, "height": 768, "solver": "euler", "seed": 42, "guidance": 4.5,
             "model": "flux1-dev"}, ["Pipeline", "Operations"]),
    Foreign("SD.Next: a JPEG with a template", "3f2ca3d", with_exif("JPEG", comment=unicode(SDNEXT_TURBO)),
            {"prompt": "a blue fox", "negative_prompt": "blurry", "steps": 9, "width": 1024, "height": 1024,
             "solver": "euler", "seed": 7, "guidance": 1, "model": "z-image-turbo"},
            ["template", "Pipeline", "Operations"]),
    Foreign("SD.Next: img2img", "3f2ca3d", with_exif("WEBP", comment=unicode(SDNEXT_IMG2IMG)),
            {"prompt": FOX, "steps": 20, "width": 1024, "height": 1024, "solver": "euler", "seed": 7, "guidance": 4,
             "model": "flux2-klein-base-4b", "strength": 0.6}, ["Pipeline", "Operations", "Init image size"]),
]  # fmt: skip


# stable-diffusion.cpp ------------------------------------------------------------------------------------------------


def sdcpp(
    prompt: str, unet: str, sampler: str, cfg: float = 1, guidance: float = 3.5, steps: int = 20, negative: str = "",
    model: str = "", te: Sequence[str] = (), vae: str = "", extra: str = "", details: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """get_image_params. Numbers are written with six decimals, models without their folders."""
    text = f"{prompt}\n" + (f"Negative prompt: {negative}\n" if negative else "")
    text += f"Steps: {steps}, CFG scale: {cfg:f}, Guidance: {guidance:f}, Eta: 0.000000, Seed: 42, Size: 1024x768, "
    text += f"Model: {model}, RNG: cuda, Sampler: {sampler}, "
    text += "".join(f"TE: {name}, " for name in te) + (f"Unet: {unet}, " if unet else "")
    text += (f"VAE: {vae}, " if vae else "") + extra + "Version: stable-diffusion.cpp"
    return text if details is None else f"{text}, SDCPP: {json.dumps(details, ensure_ascii=False)}"


def sdcpp_details(shift: float | None = None, strength: float = 0.75, **more: Any) -> dict[str, Any]:
    """build_sdcpp_image_metadata_json, shortened. An infinite shift is written as null."""
    guidance = {"txt_cfg": 1.0, "img_cfg": 1.0, "distilled_guidance": 3.5, "slg": {"scale": 0.0, "layers": [7, 8, 9]}}
    sampling = {"steps": 20, "eta": 0.0, "flow_shift": shift, "guidance": guidance, "method": "euler"}
    return {
        "schema": "sdcpp.image.params/v1", "mode": "img_gen", "seed": 42, "prompt": {"positive": FOX, "negative": ""},
        "sampling": sampling, "models": {"vae": "ae.safetensors"}, "strength": strength, "rng": "cuda", **more,
    }  # fmt: skip


def webp_with_xmp(text: str) -> bytes:
    space = "https://github.com/leejet/stable-diffusion.cpp/ns/1.0/"
    packet = (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        '  <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        f'    <rdf:Description xmlns:sdcpp="{space}">\n      <sdcpp:parameters>{escape(text)}</sdcpp:parameters>\n'
        '    </rdf:Description>\n  </rdf:RDF>\n</x:xmpmeta>\n<?xpacket end="w"?>'
    )
    return save("WEBP", xmp=packet.encode())


CPP = {"steps": 20, "solver": "euler", "seed": 42, "width": 1024, "height": 768}
TWO = ("clip_l.safetensors", "t5xxl_fp16.safetensors")
SDCPP = [
    Foreign("sd.cpp: FLUX.1 dev of 2025, without a schedule", "master-2025",
            png_of_bytes("parameters", sdcpp(FOX, "flux1-dev-q4_0.gguf", "euler", te=TWO, vae="ae.safetensors")),
            CPP | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5}, ["Eta", "RNG", "TE", "VAE"]),
    Foreign("sd.cpp: euler simple, Chinese, a guidance of its own", "97d2990",
            png_of_bytes("parameters", sdcpp(ODD, "flux1-krea-dev-Q5_K_M.gguf", "euler simple", guidance=4.5)),
            CPP | {"prompt": ODD, "model": "flux1-krea-dev", "guidance": 4.5, "schedule": "simple"}, ["Eta", "RNG"]),
    Foreign("sd.cpp: klein reads no guidance", "97d2990",
            png_of_bytes("parameters", sdcpp(FOX, "flux-2-klein-4b.safetensors", "euler discrete", steps=4,
                                             te=["qwen_3_4b.safetensors"], vae="flux2_ae.safetensors")),
            CPP | {"prompt": FOX, "model": "flux2-klein-4b", "guidance": 1, "steps": 4},
            ["Eta", "RNG", "TE", "VAE", "schedule", "Guidance"], {"schedule": "discrete", "Guidance": "3.500000"}),
    Foreign("sd.cpp: FLUX.2 dev on its own schedule", "97d2990",
            png_of_bytes("parameters", sdcpp(FOX, "flux2-dev-UD-Q4_K_XL.gguf", "euler flux2", guidance=4,
                                             details=sdcpp_details())),
            CPP | {"prompt": FOX, "model": "flux2-dev", "guidance": 4}, ["Eta", "RNG"]),
    Foreign("sd.cpp: a JPEG of Z-Image Turbo with a shift", "97d2990",
            jpeg_comment(sdcpp("橘猫, 坐着", "z_image_turbo-Q8_0.gguf", "euler simple", steps=8,
                               details=sdcpp_details(3.0))),
            CPP | {"prompt": "橘猫, 坐着", "model": "z-image-turbo", "guidance": 1, "steps": 8, "schedule": "simple",
                   "shift": 3}, ["Eta", "RNG", "Guidance"]),
    Foreign("sd.cpp: a WebP of klein base with CFG", "97d2990",
            webp_with_xmp(sdcpp("a <b> & \"c\"", "flux-2-klein-base-9b.safetensors", "dpm++2m sgm_uniform", cfg=4,
                                negative="blurry, Steps: many")),
            CPP | {"prompt": 'a <b> & "c"', "negative_prompt": "blurry, Steps: many", "guidance": 4,
                   "model": "flux2-klein-base-9b", "solver": "dpmpp_2m", "schedule": "sgm_uniform"},
            ["Eta", "RNG", "Guidance"]),
    Foreign("sd.cpp: LoRAs in the prompt and in the JSON", "97d2990",
            png_of_bytes("parameters", sdcpp(f"{FOX}<lora:fur:0.8>", "svdq-int4_r32-flux.1-dev.safetensors", "euler_a",
                details=sdcpp_details(strength=0.5, loras=[{"name": "fur", "multiplier": 0.8, "is_high_noise": False},
                                                           {"name": "ice", "multiplier": 1.0, "is_high_noise": False}])
            )),
            CPP | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5, "solver": "euler_ancestral"},
            ["Eta", "RNG", "loras", "strength"], {"loras": ["fur:0.8", "ice:1.0"], "strength": 0.5}),
    Foreign("sd.cpp: Kontext on given noise levels", "97d2990",
            png_of_bytes("parameters", sdcpp(
                FOX, "flux1-kontext-dev-Q8_0.gguf", "euler, Custom Sigmas: [1.0000, 0.7500, 0.0000]", guidance=2.5)),
            CPP | {"prompt": FOX, "model": "flux1-kontext-dev", "guidance": 2.5}, ["Eta", "RNG", "Custom Sigmas"]),
    Foreign("sd.cpp: skipped layers and a second pass", "97d2990",
            png_of_bytes("parameters", sdcpp(
                FOX, "", "euler simple", model="flux1-dev-fp8.safetensors",
                extra="Clip skip: 1, Hires upscale: Latent, Hires scale: 2.000000, Hires resize: 0x0, Hires steps: 0, "
                "Denoising strength: 0.700000, ",
            ).replace("Guidance:", "SLG scale: 2.500000, Skip layers: [7, 8, 9, ], Skip layer start: 0.010000, "
                      "Skip layer end: 0.200000, Guidance:")),
            CPP | {"prompt": FOX, "model": "flux1-dev", "guidance": 3.5, "schedule": "simple"},
            ["Eta", "RNG", "SLG scale", "Skip layers", "Skip layer start", "Skip layer end", "Clip skip",
             "Hires upscale", "Hires scale", "Hires resize", "Hires steps", "Denoising strength"]),
    Foreign("sd.cpp: no model at all", "master-2024",
            png_of_bytes("parameters", f"{FOX}\nSteps: 20, CFG scale: 1.000000, Guidance: 3.500000, Seed: 42, "
                         "Size: 1024x768, Model: , RNG: cuda, Sampler: euler, Version: stable-diffusion.cpp"),
            CPP | {"prompt": FOX, "guidance": 1}, ["RNG", "Guidance"]),
]  # fmt: skip


# Fooocus -------------------------------------------------------------------------------------------------------------

FOOOCUS_DATA = {
    "prompt": FOX, "negative_prompt": "blurry", "prompt_expansion": "", "styles": "['Fooocus V2', 'SAI Anime']",
    "performance": "Speed", "steps": 30, "resolution": "(1152, 896)", "guidance_scale": 4.0, "sharpness": 2.0,
    "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8Rundiffusion", "base_model_hash": "aeb7e9e689",
    "refiner_model": "None", "refiner_switch": 0.5, "clip_skip": 2, "sampler": "dpmpp_2m", "scheduler": "karras",
    "vae": "Default (model)", "seed": "8171928", "lora_combined_1": "sd_xl_offset_example-lora_1.0 : 0.1",
    "loras": [["sd_xl_offset_example-lora_1.0", 0.1, "4852686128"]], "full_prompt": [FOX, "cinematic"],
    "full_negative_prompt": ["blurry"], "metadata_scheme": "fooocus", "version": "Fooocus v2.5.5",
}  # fmt: skip
FOOOCUS_JSON = json.dumps(dict(sorted(FOOOCUS_DATA.items())))
FOOOCUS_TEXT = (
    f"{FOX}, cinematic\nNegative prompt: blurry\nSteps: 30, Sampler: DPM++ 2M Karras, Seed: 8171928, Size: 1152x896, "
    'CFG scale: 4.0, Sharpness: 2.0, ADM Guidance: "(1.5, 0.8, 0.3)", Model: juggernautXL_v8Rundiffusion, Model hash: '
    f"aeb7e9e689, Performance: Speed, Scheduler: karras, VAE: Default (model), Raw prompt: {FOX}, Raw negative prompt: "
    'blurry, Clip skip: 2, Lora hashes: "offset: 4852686128", Lora weights: "offset: 0.1", Version: Fooocus v2.5.5'
)
FOOOCUSED = {
    "prompt": FOX, "negative_prompt": "blurry", "steps": 30, "solver": "dpmpp_2m", "guidance": 4, "seed": 8171928,
    "width": 1152, "height": 896,
}  # fmt: skip


def fooocus_exif(kind: str, text: str, scheme: str) -> bytes:
    """get_exif: the comment lies beside the Exif IFD, as text."""
    return with_exif(kind, {0x9286: text, 0x0131: "Fooocus v2.5.5", 0x927C: scheme})


FOOOCUS_IGNORED = [
    "schedule",
    "model",
    "styles",
    "performance",
    "sharpness",
    "adm_guidance",
    "clip_skip",
    "vae",
    "loras",
]
FOOOCUS_NAMED = ["schedule", "model", "Sharpness", "ADM Guidance", "Performance", "VAE", "Clip skip", "Lora weights"]
FOOOCUS = [
    Foreign("Fooocus: a PNG in its own scheme", "2.5.5", png(parameters=FOOOCUS_JSON, fooocus_scheme="fooocus"),
            FOOOCUSED, FOOOCUS_IGNORED, {"model": "juggernautXL_v8Rundiffusion", "schedule": "karras"}),
    Foreign("Fooocus: a JPEG in its own scheme", "2.5.5", fooocus_exif("JPEG", FOOOCUS_JSON, "fooocus"), FOOOCUSED,
            FOOOCUS_IGNORED),
    Foreign("Fooocus: a WebP in its own scheme", "2.5.5", fooocus_exif("WEBP", FOOOCUS_JSON, "fooocus"), FOOOCUSED,
            FOOOCUS_IGNORED),
    Foreign("Fooocus: a PNG in A1111's scheme", "2.5.5", png(parameters=FOOOCUS_TEXT, fooocus_scheme="a1111"),
            FOOOCUSED, FOOOCUS_NAMED, {"model": "juggernautXL_v8Rundiffusion"}),
    Foreign("Fooocus: a JPEG in A1111's scheme", "2.5.5", fooocus_exif("JPEG", FOOOCUS_TEXT, "a1111"), FOOOCUSED,
            FOOOCUS_NAMED),
]  # fmt: skip


# SwarmUI -------------------------------------------------------------------------------------------------------------


def swarm(model: str, **params: Any) -> str:
    """GenFullMetadataObject: indented JSON in ASCII, the model without its ending."""
    data = {
        "prompt": FOX, "negativeprompt": "", "model": model, "images": 1, "seed": 99, "steps": 20, "cfgscale": 1.0,
        "aspectratio": "1:1", "width": 1024, "height": 1024, "sampler": "euler", "scheduler": "simple",
        "automaticvae": True, **params, "swarm_version": "0.9.8.1",
    }  # fmt: skip
    whole = {
        "sui_image_params": data,
        "sui_extra_data": {"date": "2026-01-02", "generation_time": "0.01 (prep) and 9.00 (gen) seconds"},
        "sui_models": [{"name": f"{model}.safetensors", "param": "model", "hash": "0x12ab"}],
    }
    return json.dumps(whole, indent=2)


SWARMED = {
    "prompt": FOX, "seed": 99, "steps": 20, "guidance": 1, "width": 1024, "height": 1024, "solver": "euler",
    "schedule": "simple",
}  # fmt: skip
SWARM = [
    Foreign("SwarmUI: FLUX.1 dev", "0.9.8", png(parameters=swarm("Flux/flux1-dev-fp8", fluxguidancescale=3.5)),
            SWARMED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("SwarmUI: a JPEG of FLUX.2 dev", "0.9.8",
            with_exif("JPEG", comment=unicode(swarm("flux2_dev_fp8mixed", fluxguidancescale=4.0, prompt="橘猫"), "le")),
            SWARMED | {"model": "flux2-dev", "guidance": 4, "prompt": "橘猫"}),
    Foreign("SwarmUI: a WebP of Kontext with a reference", "0.9.8",
            with_exif("WEBP", comment=unicode(swarm("flux1-kontext-dev_fp8_scaled", fluxguidancescale=2.5,
                                                    promptimages=["inputs/me.png"]), "le")),
            SWARMED | {"model": "flux1-kontext-dev", "guidance": 2.5}, ["promptimages"]),
    Foreign("SwarmUI 0.6: a JPEG with its JSON as the camera's model", "0.6.1",
            with_exif("JPEG", {0x0110: swarm("flux1-dev", fluxguidancescale=3.0)}),
            SWARMED | {"model": "flux1-dev", "guidance": 3}),
    Foreign("SwarmUI: Z-Image with CFG, from a picture", "0.9.8",
            png(parameters=swarm("z_image_bf16", cfgscale=4.0, negativeprompt="dog", sigmashift=6.0,
                                 initimagecreativity=0.6, loras=["pixel"], loraweights=["0.7"])),
            SWARMED | {"model": "z-image", "guidance": 4, "negative_prompt": "dog", "shift": 6, "strength": 0.6},
            ["loras"]),
    Foreign("SwarmUI: klein, sections of the prompt, a variation", "0.9.8",
            png(parameters=swarm("flux-2-klein-9b-kv-fp8", prompt="a face <segment:face,0.6> blue eyes",
                                 fluxguidancescale=3.5, variationseed=5, variationseedstrength=0.2)),
            SWARMED | {"model": "flux2-klein-9b-kv", "prompt": "a face", "variation": "5:0.2"},
            ["prompt_sections", "fluxguidancescale"]),
    Foreign("SwarmUI: FLUX.1 dev without a guidance", "0.9.8", png(parameters=swarm("flux1-dev")),
            {key: value for key, value in SWARMED.items() if key != "guidance"} | {"model": "flux1-dev"}),
    Foreign("SwarmUI: a model that nobody knows", "0.9.8", png(parameters=swarm("Qwen/qwen_image_2512_fp8")), SWARMED,
            ["model"]),
]  # fmt: skip


# InvokeAI ------------------------------------------------------------------------------------------------------------


def invoke(model: str, base: str, mode: str = "txt2img", **more: Any) -> bytes:
    """CoreMetadataInvocation, None left out."""
    named = {"key": "k", "hash": "blake3:1", "name": model, "base": base, "type": "main", "submodel_type": None}
    data = {
        "generation_mode": f"{base.replace('-', '_')}_{mode}", "positive_prompt": FOX, "width": 1024, "height": 768,
        "seed": 777, "steps": 30, "scheduler": "euler", "model": named, **more, "app_version": "6.12.0",
    }  # fmt: skip
    metadata = json.dumps({key: value for key, value in data.items() if value is not None})
    return png(invokeai_metadata=metadata, invokeai_graph='{"id": "flux_graph", "nodes": {}}')


INVOKED = {"prompt": FOX, "width": 1024, "height": 768, "seed": 777, "steps": 30, "solver": "euler"}
PART = {"key": "k", "hash": "h", "name": "part", "base": "flux", "type": "vae"}
INVOKE = [
    Foreign("InvokeAI: FLUX.1 dev (quantized)", "6.12",
            invoke("FLUX.1 dev (quantized)", "flux", guidance=4, dype_preset="off", vae=PART, t5_encoder=PART,
                   clip_embed_model=PART),
            INVOKED | {"model": "flux1-dev", "guidance": 4}, ["vae", "t5_encoder", "clip_embed_model"]),
    Foreign("InvokeAI: schnell reads no guidance", "6.12",
            invoke("FLUX.1 schnell", "flux", guidance=4, steps=4, scheduler="heun"),
            INVOKED | {"model": "flux1-schnell", "steps": 4, "solver": "heun"}, ["guidance"]),
    Foreign("InvokeAI: Kontext with references and a LoRA", "6.12",
            invoke("FLUX.1 Kontext dev (quantized)", "flux", guidance=2.5, ref_images=[{"id": "r"}],
                   loras=[{"model": PART, "weight": 0.75}]),
            INVOKED | {"model": "flux1-kontext-dev", "guidance": 2.5}, ["ref_images", "loras"]),
    Foreign("InvokeAI: FLUX.2 dev", "6.12",
            invoke("FLUX.2 [dev] Transformer (GGUF Q4_K_M)", "flux2", guidance=4, mistral_encoder=PART),
            INVOKED | {"model": "flux2-dev", "guidance": 4}, ["mistral_encoder"]),
    Foreign("InvokeAI: klein", "6.12", invoke("FLUX.2 Klein 9B (FP8)", "flux2", qwen3_encoder=PART, scheduler="lcm"),
            INVOKED | {"model": "flux2-klein-9b", "solver": "lcm"}, ["qwen3_encoder"]),
    Foreign("InvokeAI: Z-Image Turbo with its own shift", "6.12",
            invoke("Z-Image Turbo (quantized)", "z-image", cfg_scale=1.0, negative_prompt="fog", steps=9,
                   z_image_shift="auto", z_image_seed_variance_enabled=False, z_image_seed_variance_strength=0.1,
                   z_image_seed_variance_randomize_percent=50),
            INVOKED | {"model": "z-image-turbo", "guidance": 1, "negative_prompt": "fog", "steps": 9}),
    Foreign("InvokeAI: Z-Image Turbo with a given shift", "6.12",
            invoke("Z-Image Turbo", "z-image", cfg_scale=1.0, z_image_shift=5.0, z_image_seed_variance_enabled=True,
                   z_image_seed_variance_strength=0.1),
            INVOKED | {"model": "z-image-turbo", "guidance": 1, "shift": 5, "seed_variance": 0.1}),
    Foreign("InvokeAI 5: FLUX Dev from a picture", "5.4",
            invoke("FLUX Dev", "flux", "img2img", guidance=4, cfg_scale=1, strength=0.6, canvas_v2_metadata={"a": 1}),
            INVOKED | {"model": "flux1-dev", "guidance": 4, "strength": 0.6}),
    Foreign("InvokeAI 3: SDXL, its model under older names", "3.7.0",
            png(invokeai_metadata=json.dumps({
                "app_version": "3.7.0", "generation_mode": "sdxl_img2img", "positive_prompt": FOX,
                "negative_prompt": "ugly", "width": 1024, "height": 1024, "seed": 5, "rand_device": "cpu",
                "cfg_scale": 7.5, "steps": 40, "scheduler": "dpmpp_2m_k", "clip_skip": 0, "strength": 0.7,
                "model": {"model_name": "stable-diffusion-xl-base-1-0", "base_model": "sdxl", "model_type": "main"},
                "positive_style_prompt": "", "loras": [],
            })),
            {"prompt": FOX, "negative_prompt": "ugly", "width": 1024, "height": 1024, "seed": 5, "guidance": 7.5,
             "steps": 40, "strength": 0.7}, ["solver", "model"], {"model": "stable-diffusion-xl-base-1-0"}),
]  # fmt: skip


# mflux and Draw Things -----------------------------------------------------------------------------------------------


def mflux(kind: str, model: str, guidance: float | None, **more: Any) -> bytes:
    """_embed_metadata and MetadataBuilder: EXIF in every format, and XMP in a PNG."""
    data = {
        "mflux_version": "0.18.0", "model": model, "base_model": "None", "seed": 5, "steps": 20, "guidance": guidance,
        "height": 640, "width": 832, "precision": "mlx.core.bfloat16", "quantize": 8, "generation_time_seconds": 12.3,
        "created_at": "2026-02-03T04:05:06", "lora_paths": None, "lora_scales": None, "image_path": None,
        "image_paths": None, "image_strength": None, "prompt": "橘猫, 坐着", "negative_prompt": None, **more,
    }  # fmt: skip
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + json.dumps(data).encode()
    if kind != "PNG":
        return save(kind, exif=exif.tobytes())
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", MFLUX_XMP)
    info.add_text("IPTC", "1c027800")
    return save(kind, exif=exif.tobytes(), pnginfo=info)


MFLUX_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:mflux="http://ns.mflux.ai/1.0/">
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">another</rdf:li></rdf:Alt></dc:description>
<mflux:seed>5</mflux:seed></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
MFLUXED = {"prompt": "橘猫, 坐着", "seed": 5, "steps": 20, "width": 832, "height": 640}
MFLUX = [
    Foreign("mflux: FLUX.1 dev", "0.18", mflux("PNG", "black-forest-labs/FLUX.1-dev", 3.5),
            MFLUXED | {"model": "flux1-dev", "guidance": 3.5}, ["quantize"]),
    Foreign("mflux: a JPEG of FLUX.1 dev read with guidance 1", "0.18",
            mflux("JPEG", "black-forest-labs/FLUX.1-dev", 1.0, quantize=None),
            MFLUXED | {"model": "flux1-dev", "guidance": 1}),
    Foreign("mflux: Kontext from a picture", "0.18",
            mflux("PNG", "black-forest-labs/FLUX.1-Kontext-dev", 2.5, image_path="/me/in.png"),
            MFLUXED | {"model": "flux1-kontext-dev", "guidance": 2.5}, ["quantize", "image_path"]),
    Foreign("mflux: schnell, 40 % of a start picture kept", "0.18",
            mflux("PNG", "black-forest-labs/FLUX.1-schnell", None, image_path="/me/in.png", image_strength=0.4),
            MFLUXED | {"model": "flux1-schnell", "strength": 0.6}, ["quantize", "image_path"]),
    Foreign("mflux: klein base with CFG", "0.18",
            mflux("PNG", "black-forest-labs/FLUX.2-klein-base-4B", 1.5, negative_prompt="dog"),
            MFLUXED | {"model": "flux2-klein-base-4b", "guidance": 1.5, "negative_prompt": "dog"}, ["quantize"]),
    Foreign("mflux: a folder quantised by its user, LoRAs", "0.18",
            mflux("WEBP", "/Users/me/models/flux1-krea-dev-4bit", 4.5, lora_paths=["/l/a.safetensors"],
                  lora_scales=[0.8]),
            MFLUXED | {"model": "flux1-krea-dev", "guidance": 4.5}, ["quantize", "lora_paths", "lora_scales"]),
    Foreign("mflux: Fill", "0.18",
            mflux("PNG", "black-forest-labs/FLUX.1-Fill-dev", 30.0, image_path="/i.png", masked_image_path="/m.png"),
            MFLUXED | {"model": "flux1-fill-dev", "guidance": 30}, ["quantize", "image_path", "masked_image_path"]),
    Foreign("mflux: Z-Image, whose scale is one less", "0.18", mflux("PNG", "Tongyi-MAI/Z-Image", 4.0),
            MFLUXED | {"model": "z-image", "guidance": 5}, ["quantize"]),
]  # fmt: skip


def draw_things(model: str, scale: float, v2: Mapping[str, Any], sampler: str = "DDIM Trailing", **more: Any) -> bytes:
    """ImageConverter: the JSON is EXIF's UserComment, which the system writes as XMP into a PNG."""
    data = {
        "c": f"{FOX}, <soft> & warm", "uc": "", "steps": 8, "sampler": sampler, "scale": scale, "seed": 4022,
        "size": "1024x768", "model": model, "strength": 1, "seed_mode": "Scale Alike", "v2": dict(v2), **more,
    }  # fmt: skip
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 6.0.0">\n   '
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n      <rdf:Description rdf:about=""\n'
        '            xmlns:exif="http://ns.adobe.com/exif/1.0/"\n            xmlns:xmp="http://ns.adobe.com/xap/1.0/">\n'
        f'         <exif:UserComment>\n            <rdf:Alt>\n               <rdf:li xml:lang="x-default">'
        f"{escape(json.dumps(data, ensure_ascii=False))}</rdf:li>\n            </rdf:Alt>\n         </exif:UserComment>"
        "\n         <xmp:CreatorTool>Draw Things</xmp:CreatorTool>\n      </rdf:Description>\n   </rdf:RDF>\n"
        "</x:xmpmeta>\n"
    )
    return png(xmp=packet)


DRAWN = {"prompt": f"{FOX}, <soft> & warm", "steps": 8, "seed": 4022, "width": 1024, "height": 768}
FAST = {"speedUpWithGuidanceEmbed": True, "guidanceEmbed": 3.5, "resolutionDependentShift": True}
DRAW_THINGS = [
    Foreign("Draw Things: Z-Image Turbo", "1.20260801",
            draw_things("z_image_turbo_1.0_q8p.ckpt", 1, FAST | {"resolutionDependentShift": False}, shift=3),
            DRAWN | {"model": "z-image-turbo", "guidance": 1, "shift": 3}, ["solver"], {"solver": "DDIM Trailing"}),
    Foreign("Draw Things: FLUX.1 dev, the scale is what it reads", "1.20260801",
            draw_things("flux_1_dev_q8p.ckpt", 4.5, FAST, "Euler A Trailing", shift=3.16),
            DRAWN | {"model": "flux1-dev", "guidance": 4.5, "solver": "euler_ancestral"}, ["schedule"]),
    Foreign("Draw Things: FLUX.1 dev with CFG beside what it reads", "1.20260801",
            draw_things("flux_1_dev_q6p.ckpt", 2, FAST | {"speedUpWithGuidanceEmbed": False}, "Euler a", shift=3.16),
            DRAWN | {"model": "flux1-dev", "guidance": 3.5, "solver": "euler_ancestral"}, ["guidance"]),
    Foreign("Draw Things: klein from a picture, with a LoRA", "1.20260801",
            draw_things("flux_2_klein_4b_i8x.ckpt", 1, FAST, "LCM", strength=0.7, uc="dog",
                        lora=[{"model": "fur.ckpt", "weight": 0.6}]),
            DRAWN | {"model": "flux2-klein-4b", "guidance": 1, "solver": "lcm", "strength": 0.7,
                     "negative_prompt": "dog"}, ["lora"]),
]  # fmt: skip


# ComfyUI: graphs that run ---------------------------------------------------------------------------------------------

Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def graph(unet: str, changes: Mapping[str, Any] | None = None, **sampler: Any) -> Graph:
    """ComfyUI's own template of FLUX.1: a KSampler behind FluxGuidance."""
    settings = {"seed": 972054013131368, "steps": 20, "cfg": 1, "sampler_name": "euler", "scheduler": "simple"}
    return {
        "6": node("CLIPTextEncode", text=FOX, clip=["11", 0]),
        "8": node("VAEDecode", samples=["31", 0], vae=["10", 0]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "12": node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "27": node("EmptySD3LatentImage", width=1024, height=768, batch_size=1),
        "31": node("KSampler", **settings | {"denoise": 1} | sampler, model=["12", 0], positive=["35", 0],
                   negative=["33", 0], latent_image=["27", 0]),
        "33": node("ConditioningZeroOut", conditioning=["6", 0]),
        "35": node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
    } | dict(changes or {})  # fmt: skip


def custom(unet: str, changes: Mapping[str, Any] | None = None) -> Graph:
    """The template of FLUX.2: SamplerCustomAdvanced on the model's own schedule."""
    whole = graph(unet) | {
        "31": node("SamplerCustomAdvanced", noise=["25", 0], guider=["22", 0], sampler=["16", 0], sigmas=["17", 0],
                   latent_image=["27", 0]),
        "25": node("RandomNoise", noise_seed=972054013131368),
        "22": node("BasicGuider", model=["12", 0], conditioning=["35", 0]),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "17": node("Flux2Scheduler", steps=20, width=1024, height=768),
        "27": node("EmptyFlux2LatentImage", width=1024, height=768, batch_size=1),
        "35": node("FluxGuidance", guidance=4.0, conditioning=["6", 0]),
    }  # fmt: skip
    del whole["33"]
    return whole | dict(changes or {})


def saved(prompt: Graph | None, **extra: Any) -> bytes:
    """SaveImage: the graph to run, and the page's."""
    texts = {"prompt": json.dumps(prompt)} if prompt is not None else {}
    return png(**texts, **{key: json.dumps(value) for key, value in extra.items()})


COMFIED = {
    "prompt": FOX, "seed": 972054013131368, "steps": 20, "solver": "euler", "schedule": "simple", "width": 1024,
    "height": 768,
}  # fmt: skip
CUSTOM = {key: value for key, value in COMFIED.items() if key != "schedule"}
SHIFTED = {
    "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
    "26": node("FluxGuidance", guidance=2.8, conditioning=["6", 0]),
    "30": node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1024, height=1024, model=["12", 0]),
    "17": node("BasicScheduler", scheduler="beta", steps=28, denoise=1.0, model=["30", 0]),
    "27": node("EmptySD3LatentImage", width=832, height=1216, batch_size=1),
}
KONTEXT = {
    "31": graph("")["31"] | {"inputs": graph("")["31"]["inputs"] | {"latent_image": ["124", 0]}},
    "35": node("FluxGuidance", guidance=2.5, conditioning=["177", 0]),
    "177": node("ReferenceLatent", conditioning=["6", 0], latent=["124", 0]),
    "124": node("VAEEncode", pixels=["42", 0], vae=["10", 0]),
    "42": node("FluxKontextImageScale", image=["142", 0]),
    "142": node("LoadImage", image="rabbit.png"),
}
FILL = {
    "23": node("CLIPTextEncode", text=FOX, clip=["11", 0]),
    "26": node("FluxGuidance", guidance=30, conditioning=["23", 0]),
    "46": node("ConditioningZeroOut", conditioning=["23", 0]),
    "38": node("InpaintModelConditioning", positive=["26", 0], negative=["46", 0], vae=["10", 0], pixels=["17", 0],
               mask=["17", 1], noise_mask=False),
    "17": node("LoadImage", image="yard.png"),
    "39": node("DifferentialDiffusion", model=["12", 0]),
    "31": node("KSampler", seed=5, steps=20, cfg=1, sampler_name="euler", scheduler="normal", denoise=1,
               model=["39", 0], positive=["38", 0], negative=["38", 1], latent_image=["38", 2]),
}  # fmt: skip
WILDCARDS = {
    "6": node("CLIPTextEncode", text=["70", 0], clip=["11", 0]),
    "70": node("StringConcatenate", string_a=["71", 0], string_b="in snow", delimiter=" "),
    "71": node("ImpactWildcardProcessor", wildcard_text="a {red|blue} fox", populated_text="a red fox", seed=3),
    "35": node("FluxGuidance", guidance=["72", 0], conditioning=["73", 0]),
    "72": node("PrimitiveFloat", value=4.2),
    "73": node("Reroute (rgthree)", **{"": ["6", 0]}),
    "31": node("KSampler", seed=["74", 0], steps=["75", 0], cfg=1, sampler_name="dpmpp_2m", scheduler="sgm_uniform",
               denoise=1, model=["76", 0], positive=["35", 0], negative=["33", 0], latent_image=["27", 0]),
    "74": node("Seed (rgthree)", seed=41),
    "75": node("ComfySwitchNode", switch=["77", 0], on_false=["78", 0], on_true=["79", 0]),
    "77": node("PrimitiveBoolean", value=True),
    "78": node("PrimitiveInt", value=20),
    "79": node("PrimitiveInt", value=8),
    "76": node("Power Lora Loader (rgthree)", lora_1={"on": True, "lora": "turbo.safetensors", "strength": 1},
               lora_2={"on": False, "lora": "off.safetensors", "strength": 1}, model=["12", 0]),
}  # fmt: skip
TWO_PASSES = {
    "8": node("VAEDecode", samples=["90", 0], vae=["10", 0]),
    "90": node("KSampler", seed=2, steps=4, cfg=1, sampler_name="euler", scheduler="simple", denoise=0.4,
               model=["12", 0], positive=["35", 0], negative=["33", 0], latent_image=["91", 0]),
    "91": node("LatentUpscaleBy", samples=["31", 0], scale_by=1.5),
}  # fmt: skip
EFFICIENT = {
    "1": node("Efficient Loader", ckpt_name="z_image_turbo-AIO.safetensors", vae_name="Baked VAE", clip_skip=-1,
              lora_name="None", positive=FOX, negative="ugly", empty_latent_width=1024, empty_latent_height=768,
              batch_size=1),
    "2": node("KSampler (Efficient)", seed=7, steps=8, cfg=1, sampler_name="res_multistep", scheduler="simple",
              denoise=1, model=["1", 0], positive=["1", 1], negative=["1", 2], latent_image=["1", 3]),
    "3": node("SaveImage", filename_prefix="x", images=["2", 5]),
}  # fmt: skip

COMFY = [
    Foreign("ComfyUI: FLUX.1 dev behind FluxGuidance", "0.3.75", saved(graph("flux1-dev.safetensors"), workflow={}),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI: FLUX.1 dev in GGUF, ModelSamplingFlux, a custom sampler", "0.3.75",
            saved(custom("flux1-dev-Q6_K.gguf", SHIFTED | {
                "12": node("UnetLoaderGGUF", unet_name="flux1-dev-Q6_K.gguf")})),
            CUSTOM | {"model": "flux1-dev", "guidance": 2.8, "steps": 28, "schedule": "beta", "width": 832,
                      "height": 1216, "shift": 3.158193}),
    Foreign("ComfyUI: CLIPTextEncodeFlux", "0.3.75",
            saved(graph("flux1-krea-dev_fp8_scaled.safetensors", {
                "35": node("CLIPTextEncodeFlux", clip_l="fox, snow", t5xxl=FOX, guidance=4.5, clip=["11", 0])})),
            COMFIED | {"model": "flux1-krea-dev", "guidance": 4.5}, ["clip_l"], {"clip_l": "fox, snow"}),
    Foreign("ComfyUI: no node gives a guidance: ComfyUI gives 3.5", "0.3.75",
            saved(graph("flux1-krea-dev.safetensors", {"35": node("CLIPTextEncode", text=FOX, clip=["11", 0])})),
            COMFIED | {"model": "flux1-krea-dev", "guidance": 3.5}),
    Foreign("ComfyUI: FluxDisableGuidance", "0.3.75",
            saved(graph("flux1-dev.safetensors", {"35": node("FluxDisableGuidance", conditioning=["6", 0])})),
            COMFIED | {"model": "flux1-dev"}, ["guidance", "conditioning"]),
    Foreign("ComfyUI: Kontext, from a picture as a reference", "0.3.75",
            saved(graph("flux1-dev-kontext_fp8_scaled.safetensors", KONTEXT)),
            {key: value for key, value in COMFIED.items() if key not in ("width", "height")}
            | {"model": "flux1-kontext-dev", "guidance": 2.5}, ["references", "conditioning", "image"],
            {"references": ["rabbit.png"], "image": "rabbit.png"}),
    Foreign("ComfyUI: Fill", "0.3.75", saved(graph("flux1-fill-dev.safetensors", FILL)),
            {"prompt": FOX, "seed": 5, "steps": 20, "solver": "euler", "schedule": "normal", "guidance": 30,
             "model": "flux1-fill-dev"}, ["conditioning", "image", "model_patches"], {"image": "yard.png"}),
    Foreign("ComfyUI: schnell does not read FluxGuidance", "0.3.75",
            saved(graph("flux1-schnell-fp8.safetensors", steps=4)),
            COMFIED | {"model": "flux1-schnell", "guidance": 1, "steps": 4}, ["FluxGuidance"]),
    Foreign("ComfyUI: FLUX.2 dev on its own schedule", "0.3.75", saved(custom("flux2_dev_fp8mixed.safetensors")),
            CUSTOM | {"model": "flux2-dev", "guidance": 4}),
    Foreign("ComfyUI: klein base with CFGGuider", "0.3.75",
            saved(custom("flux-2-klein-base-4b.safetensors", {
                "22": node("CFGGuider", cfg=5, model=["12", 0], positive=["6", 0], negative=["67", 0]),
                "67": node("CLIPTextEncode", text="blurry", clip=["11", 0])})),
            CUSTOM | {"model": "flux2-klein-base-4b", "guidance": 5, "negative_prompt": "blurry"}),
    Foreign("ComfyUI: links to primitives, a switch, a reroute, wildcards, LoRAs", "0.3.75",
            saved(graph("flux1-dev-fp8.safetensors", WILDCARDS)),
            COMFIED | {"model": "flux1-dev", "guidance": 4.2, "seed": 41, "steps": 8, "solver": "dpmpp_2m",
                       "schedule": "sgm_uniform"}, ["loras"], {"loras": ["turbo.safetensors"]}),
    Foreign("ComfyUI: a second pass", "0.3.75", saved(graph("flux1-dev.safetensors", TWO_PASSES)),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}, ["later_samplers"]),
    Foreign("ComfyUI with Nunchaku: an SVDQuant file", "0.3.75",
            saved(graph("", {"12": node("NunchakuFluxDiTLoader", model_path="svdq-int4_r32-flux.1-dev.safetensors",
                                        cache_threshold=0, attention="nunchaku-fp16", cpu_offload="auto")})),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI with Efficiency Nodes", "2.0", saved(EFFICIENT),
            {"prompt": FOX, "negative_prompt": "ugly", "seed": 7, "steps": 8, "guidance": 1, "solver": "res_multistep",
             "schedule": "simple", "width": 1024, "height": 768, "model": "z-image-turbo"}),
    Foreign("ComfyUI: img2img", "0.3.75",
            saved(graph("z_image_turbo_bf16.safetensors", {
                "27": node("VAEEncode", pixels=["28", 0], vae=["10", 0]), "28": node("LoadImage", image="me.png"),
                "35": node("CLIPTextEncode", text=FOX, clip=["11", 0])}, denoise=0.55)),
            {key: value for key, value in COMFIED.items() if key not in ("width", "height")}
            | {"model": "z-image-turbo", "guidance": 1, "strength": 0.55}, ["image"]),
    Foreign("ComfyUI: a finetune", "0.3.75", saved(graph("copaxTimeless_x3.safetensors")), COMFIED | {"guidance": 1},
            ["model", "FluxGuidance"]),
    Foreign("ComfyUI: a WebP", "0.3.75",
            with_exif("WEBP", {0x0110: "prompt:" + json.dumps(graph("flux1-dev.safetensors")), 0x010F: "workflow:{}"}),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("Save Image Extended: a JPEG", "2.84",
            with_exif("JPEG", {0x010F: "Prompt: " + json.dumps(custom("flux2-dev-nvfp4-mixed.safetensors")),
                               0x010E: "Workflow: {}"}),
            CUSTOM | {"model": "flux2-dev", "guidance": 4}),
]  # fmt: skip

BEHIND_CONTROL = {
    "35": node("FluxGuidance", guidance=["72", 0], conditioning=["6", 0]),
    "72": node("Reroute", **{"": ["73", 0]}),
    "73": node("PrimitiveFloat", value=4.1),
    "80": node("ControlNetApplyAdvanced", strength=0.7, start_percent=0, end_percent=0.8, positive=["83", 0],
               negative=["84", 0], control_net=["81", 0], image=["82", 0]),
    "83": node("Reroute", **{"": ["35", 0]}),
    "84": node("CLIPTextEncode", text="ugly", clip=["11", 0]),
    "85": node("Reroute", **{"": ["80", 1]}),
    "31": node("KSampler", seed=5, steps=20, cfg=1, sampler_name="euler", scheduler="simple", denoise=1,
               model=["12", 0], positive=["80", 0], negative=["85", 0], latent_image=["27", 0]),
}  # fmt: skip
ADVANCED = {
    "31": node("KSamplerAdvanced", add_noise="enable", noise_seed=6, steps=20, cfg=1, sampler_name="euler",
               scheduler="simple", start_at_step=0, end_at_step=10000, return_with_leftover_noise="disable",
               model=["14", 0], positive=["35", 0], negative=["33", 0], latent_image=["27", 0]),
    "12": node("CheckpointLoaderSimple", ckpt_name="FLUX1/flux1-dev-fp8.safetensors"),
    "13": node("LoraLoader", lora_name="a.safetensors", strength_model=0.5, strength_clip=0.5, model=["12", 0],
               clip=["12", 1]),
    "14": node("LoraLoader", lora_name="b.safetensors", strength_model=1, strength_clip=1, model=["13", 0],
               clip=["13", 1]),
}  # fmt: skip
SIMPLE_CUSTOM = {
    "31": node("SamplerCustom", add_noise=True, noise_seed=7, cfg=4.0, model=["12", 0], positive=["6", 0],
               negative=["34", 0], sampler=["16", 0], sigmas=["17", 0], latent_image=["27", 0]),
    "34": node("CLIPTextEncode", text="ugly", clip=["11", 0]),
    "16": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "17": node("BasicScheduler", scheduler="beta", steps=30, denoise=1, model=["12", 0]),
}  # fmt: skip
JOINED = {
    "6": node("CLIPTextEncode", text=["70", 0], clip=["11", 0]),
    "70": node("Text Concatenate", delimiter=", ", clean_whitespace="true", text_a=["71", 0], text_b=["72", 0]),
    "71": node("easy positive", positive="a red fox"),
    "72": node("Text Multiline", text="in snow"),
}
DUAL = {"22": node("DualCFGGuider", cfg_conds=4.0, cfg_cond2_negative=2.0, style="regular", model=["12", 0],
                   cond1=["6", 0], cond2=["34", 0], negative=["35", 0]),
        "34": node("CLIPTextEncode", text="a blue fox", clip=["11", 0]),
        "35": node("CLIPTextEncode", text="ugly", clip=["11", 0])}  # fmt: skip
IN_SUBGRAPH = {
    f"68:{id}": part
    | {
        "inputs": {
            name: [f"68:{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in part["inputs"].items()
        }
    }
    for id, part in custom("flux2_dev_fp8mixed.safetensors").items()
    if id != "9"
} | {"9": node("SaveImage", filename_prefix="x", images=["68:8", 0])}
CLOWNSHARK = {
    "31": node("ClownsharKSampler_Beta", eta=0.5, sampler_name="exponential/res_2s", scheduler="bong_tangent",
               steps=12, steps_to_run=-1, denoise=1, cfg=1, seed=4, sampler_mode="standard", bongmath=True,
               model=["12", 0], positive=["35", 0], negative=["33", 0], latent_image=["27", 0]),
    "90": node("FluxGuidance", guidance=9, conditioning=["6", 0]),
    "35": node("FluxGuidance", guidance=2.0, conditioning=["90", 0]),
}  # fmt: skip
REWRITTEN = {
    "6": node("CLIPTextEncode", text=["70", 0], clip=["11", 0]),
    "70": node("TextGenerate", prompt="write of a fox", max_length=256, clip=["11", 0]),
}
MORE_COMFY = [
    Foreign("ComfyUI: guidance before a ControlNet, reroutes", "0.3.75",
            saved(graph("flux1-dev.safetensors", BEHIND_CONTROL)),
            COMFIED | {"seed": 5, "model": "flux1-dev", "guidance": 4.1, "negative_prompt": "ugly"},
            ["conditioning"]),
    Foreign("ComfyUI: KSamplerAdvanced, a checkpoint, two LoRAs", "0.3.75", saved(graph("", ADVANCED)),
            COMFIED | {"seed": 6, "model": "flux1-dev", "guidance": 3.5}, ["loras"],
            {"loras": ["b.safetensors:1", "a.safetensors:0.5"]}),
    Foreign("ComfyUI: SamplerCustom with CFG", "0.3.75", saved(graph("z_image_bf16.safetensors", SIMPLE_CUSTOM)),
            COMFIED | {"seed": 7, "model": "z-image", "guidance": 4, "negative_prompt": "ugly", "steps": 30,
                       "solver": "dpmpp_2m", "schedule": "beta"}),
    Foreign("ComfyUI: a loader of an unknown class", "0.3.75",
            saved(graph("", {"12": node("Fast Loader", precision="fp8", file="flux1-dev-fp8.safetensors")})),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI: a model's name from a node that cannot be read", "0.3.75",
            saved(graph("", {"12": node("UNETLoader", unet_name=["70", 0]), "70": node("Picker", at=3)})),
            COMFIED | {"guidance": 1}, ["model", "FluxGuidance"], {"model": "of a node UNETLoader"}),
    Foreign("ComfyUI: two prompts and two scales", "0.3.75",
            saved(custom("flux-2-klein-base-9b-fp8.safetensors", DUAL)),
            CUSTOM | {"model": "flux2-klein-base-9b", "guidance": 4, "negative_prompt": "ugly"}, ["guider"]),
    Foreign("ComfyUI: the ids of a subgraph's nodes", "0.3.75", saved(IN_SUBGRAPH),
            CUSTOM | {"model": "flux2-dev", "guidance": 4}),
    Foreign("ComfyUI with RES4LYF: settings of its own; the later guidance counts", "1.0",
            saved(graph("flux1-dev.safetensors", CLOWNSHARK)),
            COMFIED | {"seed": 4, "steps": 12, "solver": "res_2s", "schedule": "bong_tangent", "model": "flux1-dev",
                       "guidance": 2}, ["eta", "steps_to_run", "sampler_mode", "bongmath"]),
    Foreign("ComfyUI: texts that nodes join", "0.3.75", saved(graph("flux1-dev.safetensors", JOINED)),
            COMFIED | {"prompt": "a red fox, in snow", "model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI: a text that a language model wrote", "0.3.75", saved(graph("flux1-dev.safetensors", REWRITTEN)),
            {key: value for key, value in COMFIED.items() if key != "prompt"}
            | {"model": "flux1-dev", "guidance": 3.5}, ["prompt", "conditioning"],
            {"prompt": "a text from TextGenerate that could not be followed", "conditioning": ["CLIPTextEncode"]}),
    Foreign("ComfyUI: both graphs in a JPEG's comment, as texts", "0.3.75",
            with_exif("JPEG", comment=unicode(json.dumps(
                {"prompt": json.dumps(graph("flux1-dev.safetensors")), "workflow": "{}"}))),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
]  # fmt: skip


# ComfyUI: the page's graphs -------------------------------------------------------------------------------------------


def page(
    nodes: Mapping[int, tuple[Any, ...]],
    subgraphs: Sequence[Mapping[str, Any]] = (),
    inside: str = "",
    first_link: int = 1,
    promoted: Sequence[tuple[str, int, str]] = (),
    result: tuple[int, int] = (0, 0),
) -> Any:
    """A graph as the frontend saves it.

    nodes: id -> (class, values of the widgets, {input: (origin, output, type)}, mode, other parts). An input whose
    name begins with * belongs to a widget. inside: the id of the subgraph that this is. promoted: a subgraph's inputs
    as (name, inner node, inner input), the last with * if it is a widget's; result: what it gives out.
    """  # fmt: skip
    links: list[list[Any]] = []
    for target, (_, _, inputs, *_) in nodes.items():
        for at, (origin, output, kind) in enumerate(inputs.values()):
            links.append([first_link + len(links), origin, output, target, at, kind])
    entries = {(target, at): id for id, _, _, target, at, _ in links}
    saved_nodes = [
        {
            "id": id, "type": kind, "pos": [0, 0], "size": [270, 82], "flags": {}, "order": 0,
            "mode": (more or (0,))[0],
            "inputs": [
                {"name": name.lstrip("*"), "type": link[2], "link": entries[id, at]}
                | ({"widget": {"name": name.lstrip("*")}} if name.startswith("*") else {})
                for at, (name, link) in enumerate(inputs.items())
            ],
            "properties": {"Node name for S&R": kind}, "widgets_values": values, **(more[1] if more[1:] else {}),
        }
        for id, (kind, values, inputs, *more) in nodes.items()
    ]  # fmt: skip
    whole: dict[str, Any] = {"id": inside or "5d6c", "revision": 0, "last_node_id": 99, "nodes": saved_nodes,
                             "groups": [], "config": {}, "extra": {"frontendVersion": "1.47.10"}}  # fmt: skip
    if not inside:
        return whole | {"links": links, "definitions": {"subgraphs": list(subgraphs)}, "version": 0.4}
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    ids = {name: [id for id, origin, output, *_ in links if (origin, output) == (-10, at)]
           for at, (name, *_) in enumerate(promoted)}  # fmt: skip
    end = first_link + len(links)
    return whole | {
        "name": "Text to Image", "inputNode": {"id": -10, "bounding": [0, 0, 1, 1]}, "outputNode": {"id": -20},
        "inputs": [{"id": name, "name": name, "type": "*", "linkIds": ids[name]} for name, *_ in promoted],
        "outputs": [{"id": "o", "name": "IMAGE", "type": "IMAGE", "linkIds": [end]}], "widgets": [],
        "links": [dict(zip(names, link)) for link in (*links, [end, *result, -20, 0, "IMAGE"])],
    }  # fmt: skip


FLUX_PAGE: dict[int, tuple[Any, ...]] = {
    5: ("MarkdownNote", ["## Model links"], {}),
    6: ("CLIPTextEncode", [FOX], {"clip": (11, 0, "CLIP")}),
    8: ("VAEDecode", [], {"samples": (31, 0, "LATENT"), "vae": (10, 0, "VAE")}),
    9: ("SaveImage", ["ComfyUI"], {"images": (8, 0, "IMAGE")}),
    10: ("VAELoader", ["ae.safetensors"], {}),
    11: ("DualCLIPLoader", ["t5xxl_fp16.safetensors", "clip_l.safetensors", "flux", "default"], {}),
    12: ("UNETLoader", ["flux1-dev.safetensors", "default"], {}),
    27: ("EmptySD3LatentImage", [1024, 768, 1], {}),
    31: ("KSampler", [972054013131368, "randomize", 20, 1, "euler", "simple", 1],
         {"model": (12, 0, "MODEL"), "positive": (35, 0, "CONDITIONING"), "negative": (33, 0, "CONDITIONING"),
          "latent_image": (27, 0, "LATENT")}),
    33: ("ConditioningZeroOut", [], {"conditioning": (6, 0, "CONDITIONING")}),
    35: ("FluxGuidance", [3.5], {"conditioning": (6, 0, "CONDITIONING")}),
}  # fmt: skip
OUT = {"outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}, {"name": "CLIP", "type": "CLIP", "links": []}]}
VIRTUAL = FLUX_PAGE | {
    12: ("UNETLoader", ["flux1-dev-fp8.safetensors", "fp8_e4m3fn"], {}),
    40: ("LoraLoaderModelOnly", ["off.safetensors", 1], {"model": (12, 0, "MODEL")}, 4, OUT),
    41: ("Reroute", [], {"": (40, 0, "*")}),
    42: ("LoraLoaderModelOnly", ["fur.safetensors", 0.6], {"model": (41, 0, "MODEL")}),
    43: ("PrimitiveNode", [77, "fixed"], {}),
    44: ("SetNode", ["text"], {"CONDITIONING": (35, 0, "CONDITIONING")}),
    45: ("GetNode", ["text"], {}),
    31: ("KSampler", [5, "randomize", 20, 1, "euler", "simple", 1],
         {"model": (42, 0, "MODEL"), "positive": (45, 0, "CONDITIONING"), "negative": (33, 0, "CONDITIONING"),
          "latent_image": (27, 0, "LATENT"), "*seed": (43, 0, "INT")}),
    60: ("KSampler", [1, "fixed", 50, 7, "heun", "beta", 1],
         {"model": (12, 0, "MODEL"), "positive": (6, 0, "CONDITIONING"), "latent_image": (27, 0, "LATENT")}, 2),
    61: ("SaveImage", ["muted"], {"images": (62, 0, "IMAGE")}, 2),
    62: ("VAEDecode", [], {"samples": (60, 0, "LATENT")}, 2),
}  # fmt: skip
INNER: dict[int, tuple[Any, ...]] = {
    28: ("UNETLoader", ["z_image_turbo_bf16.safetensors", "default"], {"*unet_name": (-10, 3, "COMBO")}),
    30: ("CLIPLoader", ["qwen_3_4b.safetensors", "lumina2", "default"], {}),
    27: ("CLIPTextEncode", ["inner text"], {"clip": (30, 0, "CLIP"), "*text": (-10, 0, "STRING")}),
    33: ("ConditioningZeroOut", [], {"conditioning": (27, 0, "CONDITIONING")}),
    13: ("EmptySD3LatentImage", [1024, 768, 1], {"*width": (-10, 1, "INT")}),
    11: ("ModelSamplingAuraFlow", [3], {"model": (28, 0, "MODEL")}),
    3: ("KSampler", [11, "randomize", 8, 1, "res_multistep", "simple", 1],
        {"model": (11, 0, "MODEL"), "positive": (27, 0, "CONDITIONING"), "negative": (33, 0, "CONDITIONING"),
         "latent_image": (13, 0, "LATENT"), "*seed": (-10, 2, "INT")}),
    8: ("VAEDecode", [], {"samples": (3, 0, "LATENT")}),
}  # fmt: skip
PROMOTED = [("text", 27, "*text"), ("width", 13, "*width"), ("seed", 3, "*seed"), ("unet_name", 28, "*unet_name")]
SUBGRAPH = page(INNER, inside="f2fd-sub", first_link=30, promoted=PROMOTED, result=(8, 0))


def with_subgraph(values: Sequence[Any], text: Mapping[str, Any] | None = None, mode: int = 0) -> Any:
    proxies = {"properties": {"proxyWidgets": [["27", "text"], ["13", "width"], ["3", "seed"], ["28", "unet_name"]]}}
    return page({
        9: ("SaveImage", ["z"], {"images": (57, 0, "IMAGE")}),
        76: ("PrimitiveStringMultiline", ["from outside"], {}),
        57: ("f2fd-sub", list(values), text or {}, mode, proxies),
    }, [SUBGRAPH])  # fmt: skip


NESTED = page(
    {1: ("f2fd-sub", [], {"*text": (-10, 0, "STRING")})}, inside="nest-sub", first_link=80,
    promoted=[("prompt", 1, "*text")], result=(1, 0),
)  # fmt: skip
ZIMAGE = {"seed": 11, "steps": 8, "guidance": 1, "solver": "res_multistep", "schedule": "simple", "width": 1024,
          "height": 768, "model": "z-image-turbo", "shift": 3}  # fmt: skip
UNKNOWN_NODES = FLUX_PAGE | {
    27: ("Size Picker", [832, 1216], {"*width": (70, 0, "INT"), "*height": (70, 1, "INT")}),
    70: ("Ratio", ["2:3"], {}),
    50: ("EmptyLatentImage", [512, 512, 2], {}),
    31: ("KSampler", [9, "fixed", 25, 1, "heun", "beta", 1],
         {"model": (12, 0, "MODEL"), "positive": (35, 0, "CONDITIONING"), "negative": (33, 0, "CONDITIONING"),
          "latent_image": (50, 0, "LATENT")}),
    35: ("Guidance Plus", [2.7, True], {"conditioning": (6, 0, "CONDITIONING")}, 0, {"inputs": [
        {"name": "conditioning", "type": "CONDITIONING", "link": 2},
        {"name": "guidance", "type": "FLOAT", "link": None, "widget": {"name": "guidance"}},
        {"name": "on", "type": "BOOLEAN", "link": None, "widget": {"name": "on"}}]}),
}  # fmt: skip


def first_link_into(whole: Any, target: int) -> int:
    return next(link[0] for link in whole["links"] if link[3] == target)


def unknown_nodes() -> Any:
    whole = page(UNKNOWN_NODES)
    plus = next(entry for entry in whole["nodes"] if entry["id"] == 35)
    plus["inputs"][0]["link"] = first_link_into(whole, 35)
    return whole


OBJECT_LINKS = page(FLUX_PAGE)
OBJECT_LINKS = OBJECT_LINKS | {
    "version": 1,
    "links": [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
        for link in OBJECT_LINKS["links"]
    ],
}
PAGES = [
    Foreign("ComfyUI's page alone: FLUX.1 dev", "1.47.10", saved(None, workflow=page(FLUX_PAGE)),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI's page alone: links as objects", "1.47.10", saved(None, workflow=OBJECT_LINKS),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI's page alone: muted, bypassed and virtual nodes", "1.47.10",
            saved(None, workflow=page(VIRTUAL)),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5, "seed": 77}, ["loras"],
            {"loras": ["fur.safetensors:0.6"]}),
    Foreign("ComfyUI's page alone: a subgraph whose widgets keep their values", "1.45.0",
            saved(None, workflow=with_subgraph([])), ZIMAGE | {"prompt": "inner text"}),
    Foreign("ComfyUI's page alone: a subgraph with values of its use", "1.47.10",
            saved(None, workflow=with_subgraph(["used text", 832, 12, "z_image_bf16.safetensors"])),
            ZIMAGE | {"prompt": "used text", "width": 832, "seed": 12, "model": "z-image"}),
    Foreign("ComfyUI's page alone: a subgraph with a link from outside", "1.47.10",
            saved(None, workflow=with_subgraph([], {"*text": (76, 0, "STRING")})),
            ZIMAGE | {"prompt": "from outside"}),
    Foreign("ComfyUI's page alone: a subgraph in a subgraph", "1.47.10",
            saved(None, workflow=page({
                9: ("SaveImage", ["z"], {"images": (57, 0, "IMAGE")}),
                76: ("PrimitiveStringMultiline", ["from far outside"], {}),
                57: ("nest-sub", [], {"*prompt": (76, 0, "STRING")}),
            }, [SUBGRAPH, NESTED])), ZIMAGE | {"prompt": "from far outside"}),
    Foreign("ComfyUI's page alone: nodes of unknown classes", "1.47.10", saved(None, workflow=unknown_nodes()),
            {"prompt": FOX, "seed": 9, "steps": 25, "solver": "heun", "schedule": "beta", "width": 512, "height": 512,
             "model": "flux1-dev", "guidance": 2.7}, ["batch_size"]),
    Foreign("ComfyUI's page beside an empty graph to run", "1.47.10", saved({}, workflow=page(FLUX_PAGE)),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
    Foreign("ComfyUI's page alone: a WebP", "1.47.10",
            with_exif("WEBP", {0x010F: "workflow:" + json.dumps(page(FLUX_PAGE))}),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}),
]  # fmt: skip


# Texts of ComfyUI's nodes, and Civitai --------------------------------------------------------------------------------


def image_saver(model: str, cfg: float, sampler: str = "Euler", more: str = "") -> str:
    return (
        f"{FOX}\nNegative prompt: \nSteps: 20, Sampler: {sampler}, CFG scale: {cfg}, Seed: 972054013131368, "
        f"Size: 1024x768, Model hash: 4610115bb0, Model: {model}, Hashes: "
        f'{{"model":"4610115bb0","LORA:fur":"dead"}}, Version: ComfyUI{more}'
    )


SAVED = {key: value for key, value in COMFIED.items() if key != "schedule"}
RESOURCES = (
    ', Civitai resources: [{"modelName":"Fur, real","versionName":"v1","weight":0.8,'
    '"air":"urn:air:flux1:lora:civitai:1@2"}]'
)
CIVITAI = (
    f"{FOX}\nNegative prompt: ugly\nSteps: 25, Sampler: Euler, CFG scale: 3.5, Seed: 7, Size: 832x1216, Clip skip: 2, "
    'Created Date: 2026-02-25T22:09:08.8166925Z, Civitai resources: [{"type":"checkpoint","modelVersionId":691639,'
    '"modelName":"FLUX","modelVersionName":"Dev"},{"type":"lora","weight":0.7,"modelVersionId":5,"modelName":"Fur"}], '
    'Civitai metadata: {"workflow":"txt2img","aspectRatio":{"value":"2:3","width":832}}'
)
Z_CIVITAI = (
    f"{FOX}\nSteps: 9, Sampler: Undefined, CFG scale: 1, Seed: 7, Size: 832x1216, Created Date: 2026-02-25T22:09:08Z, "
    'Civitai resources: [{"type":"checkpoint","modelVersionId":2442439,"modelName":"Z Image","modelVersionName":"Turbo"'
    "}], Civitai metadata: {}"
)
AIRS = graph("urn:air:flux1:checkpoint:civitai:618692@691639")
EXTRA_METADATA = {
    "prompt": FOX, "negativePrompt": "ugly", "cfgScale": 4, "steps": 25, "seed": 7, "sampler": "euler",
    "scheduler": "simple", "denoise": 1, "workflowId": "txt2img",
    "resources": [{"modelVersionId": 2442439, "strength": 1}],
}  # fmt: skip
TEXTS = [
    Foreign("Image Saver: the guidance is only in the graph", "1.20",
            png(parameters=image_saver("flux1-dev", 1.0), prompt=json.dumps(graph("flux1-dev.safetensors")),
                workflow="{}"),
            COMFIED | {"model": "flux1-dev", "guidance": 3.5}, ["loras"], {"loras": ["fur"]}),
    Foreign("Image Saver: a JPEG without a graph, its CFG wired to the guidance", "1.20",
            with_exif("JPEG", comment=unicode(image_saver("flux1-kontext-dev_fp8_scaled_KJ", 2.5, "euler_beta",
                                                          RESOURCES))),
            SAVED | {"model": "flux1-kontext-dev", "guidance": 2.5, "schedule": "beta"},
            ["loras", "Civitai resources"]),
    Foreign("Image Saver: a WebP with both", "1.20",
            with_exif("WEBP", {0x0110: "prompt:" + json.dumps(custom("flux2-dev.safetensors")),
                               0x010F: "workflow:{}"}, unicode(image_saver("flux2-dev", 1.0, "res_multistep_simple"))),
            SAVED | {"model": "flux2-dev", "guidance": 4, "solver": "res_multistep", "schedule": "simple"},
            ["loras"]),
    Foreign("Civitai: a JPEG of its generator", "2026-02", with_exif("JPEG", comment=unicode(CIVITAI)),
            {"prompt": FOX, "negative_prompt": "ugly", "steps": 25, "solver": "euler", "guidance": 3.5, "seed": 7,
             "width": 832, "height": 1216, "model": "flux1-dev"},
            ["Clip skip", "Civitai resources", "Civitai metadata"]),
    Foreign("Civitai: Z-Image Turbo, without a solver's name", "2026-02",
            with_exif("JPEG", comment=unicode(Z_CIVITAI)),
            {"prompt": FOX, "steps": 9, "guidance": 1, "seed": 7, "width": 832, "height": 1216,
             "model": "z-image-turbo"}, ["solver", "Civitai resources"]),
    Foreign("Civitai: a JPEG of its ComfyUI, a graph with numbers of models", "2026-02",
            with_exif("JPEG", comment=unicode(json.dumps(
                {**AIRS, "extra": {"airs": ["urn:air:flux1:checkpoint:civitai:618692@691639"]},
                 "extraMetadata": json.dumps(EXTRA_METADATA)}))),
            COMFIED | {"guidance": 1}, ["model", "FluxGuidance"],
            {"model": "urn:air:flux1:checkpoint:civitai:618692@691639"}),
    Foreign("Civitai: only its summary can be read", "2026-02",
            with_exif("JPEG", comment=unicode(json.dumps(
                {"1": node("Remote", wish="x"), "extra": {"airs": []}, "extraMetadata": json.dumps(EXTRA_METADATA)}))),
            {"prompt": FOX, "negative_prompt": "ugly", "guidance": 4, "steps": 25, "seed": 7, "solver": "euler",
             "schedule": "simple"}, ["resources"]),
]  # fmt: skip

# Other writers --------------------------------------------------------------------------------------------------------

LIGHTHOUSE = "a lighthouse, at 6:00, storm"
LIT = {
    "prompt": LIGHTHOUSE, "negative_prompt": "fog", "steps": 20, "solver": "euler", "schedule": "simple", "seed": 8,
    "width": 1024, "height": 768, "model": "flux1-dev", "guidance": 3,
}  # fmt: skip
TEXT = (
    f"{LIGHTHOUSE}\nNegative prompt: fog\nSteps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, "
    "Distilled CFG Scale: 3, Seed: 8, Size: 1024x768, Model: flux1-dev-fp8, Version: f2.0.1"
)
RUINED = {
    "Prompt": LIGHTHOUSE, "Negative": "fog", "steps": 20, "cfg": 3.5, "width": 1024, "height": 768, "seed": 8,
    "sampler_name": "euler", "scheduler": "simple", "base_model_name": "flux1-dev-Q8_0.gguf", "base_model_hash": "ab",
    "loras": [["", "fur.safetensors - 0.8"]], "start_step": 0, "denoise": None, "clip_skip": 1,
    "software": "RuinedFooocus",
}  # fmt: skip
EASY = {
    "prompt": LIGHTHOUSE, "seed": "8", "used_random_seed": "True", "negative_prompt": "fog", "num_outputs": "1",
    "num_inference_steps": "20", "guidance_scale": "1.0", "distilled_guidance_scale": "3.5", "width": "1024",
    "height": "768", "vram_usage_level": "balanced", "sampler_name": "euler", "scheduler_name": "simple",
    "use_stable_diffusion_model": "flux1-dev-bnb-nf4-v2", "output_format": "png", "clip_skip": "True",
}  # fmt: skip
SCRIPTS = {
    "prompt": LIGHTHOUSE, "seed": "8", "sampler": "euler", "steps": "20", "scale": "4.0", "negative-prompt": "fog",
    "crop-top": "0",
}  # fmt: skip
WITH_METADATA = (
    f"{LIGHTHOUSE}\nNegative prompt: fog\nSteps: 20, Sampler: Euler Simple, CFG scale: 1.0, Guidance: 3.5, Seed: 8, "
    "Size: 1024x768, Model: flux1-dev-fp8, Model hash: ab12, VAE: ae.safetensors, Lora_0 Model name: fur.safetensors, "
    "Lora_0 Strength model: 0.8, Batch index: 0, Batch size: 2"
)
NEO = TEXT.replace("Distilled CFG Scale: 3", "Shift: 9").replace("flux1-dev-fp8", "z-image-turbo_fp8_scaled_e4m3fn_KJ")
ESSENTIALS = graph("flux1-dev.safetensors", {
    "31": node("FluxSamplerParams+", seed="8", sampler="euler", scheduler="simple", steps="20", guidance="3.1",
               max_shift="1.15", base_shift="0.5", denoise="1.0", model=["12", 0], conditioning=["6", 0],
               latent_image=["27", 0])})  # fmt: skip
PIPED = {
    "1": node("easy fullLoader", ckpt_name="z_image_turbo-AIO.safetensors", vae_name="Baked VAE", clip_skip=-1,
              lora_name="None", lora_model_strength=1, resolution="自定义 x 自定义", empty_latent_width=1024,
              empty_latent_height=768, positive=LIGHTHOUSE, negative="fog", batch_size=1),
    "2": node("easy preSampling", steps=8, cfg=1, sampler_name="euler", scheduler="simple", denoise=1, seed=8,
              pipe=["1", 0]),
    "3": node("easy kSampler", image_output="Save", link_id=0, save_prefix="x", pipe=["2", 0]),
}  # fmt: skip
IN_EXIF = {
    "c": LIGHTHOUSE, "uc": "fog", "steps": 20, "sampler": "Euler A Trailing", "scale": 3.5, "seed": 8,
    "size": "1024x768", "model": "flux_1_dev_q8p.ckpt", "strength": 1, "seed_mode": "Scale Alike", "v2": FAST,
}  # fmt: skip
MAKERS = {0x0131: "AI generated;txt2img;flux", 0x010F: "Black Forest Labs", 0x0110: "flux-dev", 0x010E: LIGHTHOUSE}


def compressed(text: str, international: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    if international:
        info.add_itxt("parameters", text, zip=True)
    else:
        info.add_text("parameters", text, zip=True)
    return save("PNG", pnginfo=info)


def chunks(texts: Mapping[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    return save("PNG", pnginfo=info)


OTHERS = [
    Foreign("RuinedFooocus", "1.60", png(parameters=json.dumps(RUINED)), LIT | {"guidance": 3.5},
            ["loras", "clip_skip"]),
    Foreign("Stability Matrix: nothing says the guidance", "2.13",
            chunks({"parameters": TEXT.replace(", Distilled CFG Scale: 3", ""), "parameters-json": "{}",
                    "smproj": "{}"}), {key: value for key, value in LIT.items() if key != "guidance"}),
    Foreign("Easy Diffusion", "3.5", chunks(EASY), LIT | {"guidance": 3.5}, ["clip_skip"]),
    Foreign("sd-scripts", "0.9", chunks(SCRIPTS),
            {"prompt": LIGHTHOUSE, "negative_prompt": "fog", "steps": 20, "seed": 8, "solver": "euler", "guidance": 4},
            ["crop-top"]),
    Foreign("Black Forest Labs' own program", "2024", with_exif("JPEG", MAKERS),
            {"prompt": LIGHTHOUSE, "model": "flux1-dev"}),
    Foreign("A1111's text as an ASCII comment", "1.10", with_exif("JPEG", comment=b"ASCII\0\0\0" + TEXT.encode()), LIT),
    Foreign("A1111's text as an image's description", "1.10", with_exif("JPEG", {0x010E: TEXT}), LIT),
    Foreign("A1111's text as Windows' comment", "1.10", with_exif("JPEG", {0x9C9C: f"{TEXT}\0".encode("utf-16-le")}),
            LIT),
    Foreign("A1111's text, compressed", "1.10", compressed(TEXT, False), LIT),
    Foreign("A1111's text, compressed, Chinese", "1.10", compressed(TEXT.replace("storm", "橘"), True),
            LIT | {"prompt": LIGHTHOUSE.replace("storm", "橘")}),
    Foreign("A1111's text with line ends of Windows", "1.10", png(parameters=TEXT.replace("\n", "\r\n")), LIT),
    Foreign("Forge Neo: Z-Image Turbo with a shift", "neo", png(parameters=f"{NEO}, Module 1: qwen_3_4b"),
            LIT | {"guidance": 1, "shift": 9, "model": "z-image-turbo"}, ["Module 1"]),
    Foreign("Save Image with Metadata: its guidance", "1.2", png(parameters=WITH_METADATA), LIT | {"guidance": 3.5},
            ["VAE", "Lora_0 Model name", "Lora_0 Strength model", "Batch index", "Batch size"]),
    Foreign("ComfyUI with Essentials: a sampler with all settings", "1.1", saved(ESSENTIALS),
            COMFIED | {"seed": 8, "model": "flux1-dev", "guidance": 3.1}, ["max_shift", "base_shift"]),
    Foreign("ComfyUI with Easy-Use: pipes", "1.3", saved(PIPED),
            LIT | {"steps": 8, "guidance": 1, "model": "z-image-turbo"}),
    Foreign("Draw Things: a JPEG", "1.20260801",
            with_exif("JPEG", comment=b"ASCII\0\0\0" + json.dumps(IN_EXIF).encode()),
            {key: value for key, value in LIT.items() if key != "schedule"}
            | {"guidance": 3.5, "solver": "euler_ancestral"}, ["schedule"]),
]  # fmt: skip

FOREIGN: Sequence[Foreign] = [
    *A1111, *SDCPP, *FOOOCUS, *SWARM, *INVOKE, *MFLUX, *DRAW_THINGS, *COMFY, *MORE_COMFY, *PAGES, *TEXTS, *OTHERS,
]  # fmt: skip
