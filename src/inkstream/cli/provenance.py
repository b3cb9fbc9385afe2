"""`inkstream provenance`: the certificate that signs pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

provenance = App(name="provenance", help_format="plaintext", default_parameter=Parameter(negative=""))


@provenance.command
def init(
    *, producer: str = "inkstream", folder: Annotated[Path | None, Parameter(alias="-o", show_default=False)] = None
) -> None:
    """Make a certificate of your own, with which --provenance eu signs pictures. The certificate's path goes to stdout.

    Programs that verify such a picture say that it is unchanged, and that they do not know who signed it. To be known,
    put a certificate of an authority into certificate.pem, and its key (ES256) into key.pem.

    Parameters
    ----------
    producer
        Name of who makes the pictures: in the certificate, and in the AIGC metadata of --provenance cn.
    folder
        Folder to write; default: the one that is read, which INKSTREAM_PROVENANCE can change.
    """
    from inkstream.engine.pictures.signing import CERTIFICATE, make_certificate, provenance_folder

    place = folder or provenance_folder()
    make_certificate(producer, place)
    print(place / CERTIFICATE)
