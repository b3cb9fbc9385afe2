"""A prompt enhancer: a chat server with OpenAI's API that writes prompts out. It is a `Writer`, as language models are.

`Machine.enhancer` names it. The switch is the request's `upsample`, as for every other writer.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from inkstream.engine.keys import find_key
from inkstream.engine.wire import Lines, Peer, ask, open_peer, stream
from inkstream.types import InputError, Machine, Spec, as_list, as_object

KEY = "INKSTREAM_ENHANCER_KEY"
"""The environment variable, or the name in the keyring, of the server's key."""
LONGEST = 6000
"""Most characters of a written prompt. A text that is longer is none."""
TEMPERATURE = 0.6

ENGLISH = """You rewrite a short request for a picture as the full prompt of a text-to-image model.

- Answer with the prompt alone: one paragraph of plain English, 60 to 180 words. No title, no list, no quotation marks \
around it, no comment.
- Keep everything that is asked for: each subject, its number, colour, material and place, and each relation between \
them. Do not swap anything, and do not add people, brands or signatures.
- Text that the picture shows stays letter for letter, in double quotes, in its own language. Say where it stands and \
how it is written. Show no other text.
- Add what a picture needs and the request leaves open: the setting, the light, the viewpoint, the composition, the \
materials, the colours, the mood. One consistent style. If a style is named, keep it.
- Name what is to be seen, not what is to be absent. No weights, no tags such as "masterpiece" or "8k".
- If the request is long and complete, change little."""

CHINESE = """你把一句简短的画面要求改写成文生图模型的完整提示词。

- 只回答提示词本身：一段通顺的中文，100 到 300 字。不要标题、列表、外层引号或说明。
- 保留要求中的全部内容：每个主体及其数量、颜色、材质、位置和相互关系。不得替换，也不要添加人物、品牌或签名。
- 画面中出现的文字逐字保留，用双引号括起来，语言不变，并说明位置和字体；不要出现其他文字。
- 补充要求未说明而画面需要的内容：环境、光线、视角、构图、材质、色彩、氛围。风格统一；已指定的风格不变。
- 只写看得见的内容，不写“没有什么”。不要权重，也不要“杰作”“8k”之类的标签。
- 要求已经详细完整时，只作少量改动。"""

EDIT_ENGLISH = """You rewrite a short request to edit {count} as one clear instruction for a picture-editing model.

- Answer with the instruction alone: one to three sentences of plain English. No list, no quotation marks around it, \
no comment. You do not see the pictures: claim nothing about them that the request does not say.
- Say what changes, where, and into what. Then say what stays as it is.
- The pictures are called "image 1", "image 2" and so on; keep these names.
- Text that the picture is to show stays letter for letter, in double quotes."""

EDIT_CHINESE = """你把一句修改{count}的简短要求改写成图像编辑模型的一条清楚指令。

- 只回答指令本身：一到三句通顺的中文。不要列表、外层引号或说明。你看不到图片：不要断言要求中没有的内容。
- 说明改什么、在哪里、改成什么，再说明保持不变的部分。
- 图片称为“image 1”“image 2”等，名称不变。
- 画面中要出现的文字逐字保留，用双引号括起来。"""


_LABEL = re.compile(r"^(\*\*)?(enhanced |rewritten )?(prompt|提示词)(\*\*)?\s*[:：](\*\*)?\s*", re.IGNORECASE)


def is_address(enhancer: str) -> bool:
    """Whether an enhancer is a server; otherwise it is a model here whose language model writes."""
    return enhancer.startswith(("http://", "https://"))


def able(spec: Spec, machine: Machine) -> Spec:
    """The Spec of a model on a machine: with an enhancer, prompts are written out unless the request says no.

    A model with a grammar of its own has its own language, which no enhancer writes.
    """
    if machine.enhancer is None or spec.writer:
        return spec
    added = {"upsample", "upsample_references", "enhanced"}
    takes = None if spec.takes is None else spec.takes | {"upsample"}
    return replace(spec, abilities=spec.abilities | added, takes=takes)


def instruct(prompt: str, references: int) -> str:
    """The system prompt: in the language of the prompt, and for an edit if there are references."""
    chinese = len(re.findall(r"[\u3400-\u9fff]", prompt)) * 4 > len(re.sub(r"\s", "", prompt))
    if not references:
        return CHINESE if chinese else ENGLISH
    if chinese:
        return EDIT_CHINESE.replace("{count}", "一张图片" if references == 1 else f" {references} 张图片")
    return EDIT_ENGLISH.replace("{count}", "a picture" if references == 1 else f"{references} pictures")


class ChatWriter:
    """Writes prompts out by a chat server with OpenAI's API. The pictures are not sent.

    address: up to /v1. model: its name there; None: the first that the server lists. Raises InputError for an address
    that is none, or that would carry the key unencrypted.
    """

    def __init__(self, address: str, model: str | None = None):
        key = find_key(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.peer = open_peer("the enhancer", address, f"check {KEY} and the address", key, headers)
        self.model = model

    def attach(self, encoder: Any, tokenizer: Any) -> None:
        """Needs no text encoder."""

    def write(self, prompt: str, references: Sequence[object], seed: int) -> Iterator[str]:
        """Yield a fuller prompt as it grows; before its first words, empty texts while it is waited for."""
        if self.model is None:
            first: str = yield from _waiting(first_model(self.peer, "--enhancer-model"))
            self.model = first
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": instruct(prompt, len(references))},
                {"role": "user", "content": prompt},
            ],
            "temperature": TEMPERATURE,
            "seed": seed % 2**31,
            "stream": True,
        }
        text = ""
        for item in stream(self.peer, "chat/completions", asked):
            if not isinstance(item, str):
                text += content_of(item[1])
                if len(text) > 4 * LONGEST:
                    raise InputError(f"the enhancer writes more than {4 * LONGEST} characters: take another model")
            yield plain(text)
        if not plain(text) or len(plain(text)) > LONGEST:
            raise InputError("the enhancer wrote no prompt: leave upsample out, or give another --enhancer-model")
        yield plain(text)


def plain(text: str) -> str:
    """The prompt in an answer: without thoughts, fences, a label and quotes around it."""
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).strip()
    text = re.sub(r"^```\w*\n?|\n?```$", "", text).strip()
    text = _LABEL.sub("", text)
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and not set('"“”') & set(text[1:-1]):
        text = text[1:-1]
    return " ".join(text.split())


def first_model(peer: Peer, option: str) -> Lines:
    """The first model that a server lists. Raises InputError if it lists none. option: names one."""
    listed = as_object((yield from ask(peer, "GET", "models"))) or {}
    names = [str((as_object(one) or {}).get("id", "")) for one in as_list(listed.get("data"))]
    if not names or not names[0]:
        raise InputError(f"{peer.title} lists no model: name one with {option}")
    return names[0]


def _waiting(lines: Lines) -> Generator[str, None, Any]:
    """Yield an empty text for each line of a request, and return its answer."""
    while True:
        try:
            next(lines)
        except StopIteration as end:
            return end.value
        yield ""


def content_of(event: Any) -> str:
    """The text in one event of a chat's stream, or in a whole answer."""
    choice = as_object((as_list((as_object(event) or {}).get("choices")) or [None])[0]) or {}
    found = as_object(choice.get("delta")) or as_object(choice.get("message")) or {}
    content = found.get("content")
    return content if isinstance(content, str) else ""
