"""C2PA manifests by c2pa-python, from the extra `provenance`: a self-made certificate, signing, and verifying."""

from __future__ import annotations

import datetime
import io
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inkstream import __version__
from inkstream.types import InputError

FOLDER = "INKSTREAM_PROVENANCE"
"""Environment variable: the folder of certificate, key and producer; default: in the user's data folder."""
CERTIFICATE, KEY, PRODUCER = "certificate.pem", "key.pem", "producer.txt"
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
YEARS = 5
INSTALL = "pip install 'inkstream[provenance]'"
INIT = "make one with inkstream provenance init"


def provenance_folder() -> Path:
    """Return the folder of the certificate. It need not exist."""
    if given := os.environ.get(FOLDER):
        return Path(given).expanduser()
    from platformdirs import user_data_path

    return user_data_path("inkstream") / "provenance"


def producer() -> str:
    """Return the name of who makes pictures here, as `make_certificate` was told; inkstream without it."""
    try:
        return (provenance_folder() / PRODUCER).read_text("utf-8").strip() or "inkstream"
    except OSError:
        return "inkstream"


def check_signing() -> None:
    """Raise InputError if pictures cannot be signed here."""
    if find_spec("c2pa") is None:
        raise InputError(f"provenance eu signs pictures with c2pa-python, which is not installed: {INSTALL}")
    for name in (CERTIFICATE, KEY):
        if not (provenance_folder() / name).is_file():
            raise InputError(f"provenance eu needs a certificate, and {name} is not in its folder: {INIT}")


def make_certificate(name: str, folder: Path) -> None:
    """Write a new key, a certificate for it by an authority of its own, and the producer's name, into a folder.

    The authority's key is thrown away. Raises InputError if the folder has a key already, or without the extra.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise InputError(f"making a certificate needs cryptography ({error}): {INSTALL}") from None
    if not name.strip() or len(name) > 64 or not name.isprintable():
        raise InputError(f"producer {name[:70]!r} is not a name of 1 to 64 printable characters: give another one")
    if (folder / KEY).exists():
        raise InputError(f"{folder} has a key already and is not overwritten: remove its files, or give another folder")
    now = datetime.datetime.now(datetime.UTC)

    def named(common: str) -> Any:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, common)]
        )

    def issue(subject: Any, issuer: Any, key: Any, signer: Any, authority: bool) -> Any:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if not authority:
            purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            built = built.add_extension(purposes, critical=False)
        return built.sign(signer, hashes.SHA256())

    root, leaf = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = issue(named("inkstream authority"), named("inkstream authority"), root, root, authority=True)
    own = issue(named("inkstream"), named("inkstream authority"), leaf, root, authority=False)
    pem = serialization.Encoding.PEM
    key = leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CERTIFICATE).write_bytes(own.public_bytes(pem) + authority.public_bytes(pem))
    (folder / PRODUCER).write_text(name.strip() + "\n", "utf-8")
    with os.fdopen(os.open(folder / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)


def sign(data: bytes, kind: str, source_type: str, title: str) -> bytes:
    """Return a picture's file with a signed manifest. Nothing may be written into the file afterwards.

    kind: PNG, JPEG or WEBP. source_type: IPTC's. Raises InputError if pictures cannot be signed here.
    """
    check_signing()
    c2pa = _library()
    action = {"action": "c2pa.created", "digitalSourceType": source_type}
    manifest = {
        "claim_generator_info": [{"name": "inkstream", "version": __version__}],
        "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    signed = io.BytesIO()
    try:
        with c2pa.Builder.from_json(json.dumps(manifest), _context()) as builder:
            builder.sign(TYPES[kind], io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        line = " ".join(str(error).split())
        raise InputError(f"the picture cannot be signed ({line}): {INIT}, in an empty folder") from None
    return signed.getvalue()


def _library() -> Any:
    """c2pa-python, which is typed as Any, because it need not be installed."""
    return import_module("c2pa")


def _context() -> Any:
    folder = provenance_folder()
    return _context_of((folder / CERTIFICATE).read_text(), (folder / KEY).read_text())


@lru_cache(maxsize=2)
def _context_of(certificate: str, key: str) -> Any:
    """A context that signs with a certificate, adds no thumbnail, and asks no server for a time."""
    c2pa = _library()
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", certificate.encode(), key.encode(), None))
    settings = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
    return c2pa.ContextBuilder().with_settings(settings).with_signer(signer).build()


def verify_signature(data: bytes, kind: str | None) -> Mapping[str, str]:
    """Return what is known of a file's manifest: its state, who signed, and what is wrong; empty if it has none."""
    if b"c2pa" not in data or kind not in TYPES:
        return {}
    if find_spec("c2pa") is None:
        return {"state": f"not verified: {INSTALL}"}
    c2pa = _library()
    try:
        reader = c2pa.Reader.try_create(TYPES[kind], io.BytesIO(data))
        if reader is None:
            return {}
        with reader:
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError as error:
        return {"state": f"cannot be read: {' '.join(str(error).split())[:200]}"}
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signature = manifest.get("signature_info", {})
    wrong = [status.get("code", "") for status in store.get("validation_status", [])]
    facts = {
        "state": str(state).lower(),
        "signed_by": str(signature.get("issuer", "")),
        "signed_with": str(signature.get("common_name", "")),
        "problems": ", ".join(dict.fromkeys(wrong)),
    }
    return {name: "".join(c for c in value if c.isprintable())[:200] for name, value in facts.items() if value}
