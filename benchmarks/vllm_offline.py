"""vLLM for a machine that has PyTorch and a GPU but no network, in files small enough to be carried there.

    python benchmarks/vllm_offline.py --out vllm-parts --capability 90      # here; 90: for H100s and H200s alone, a third of the size
    cat vllm-parts/part-* | tar -x --xz -C site && export PYTHONPATH=site:src   # there

What serving a dense model in 16 bits needs: vLLM's Python files, its kernels, FlashAttention 3, and the packages that it imports. Left
out are the kernels of mixtures of experts, of other attention, and what an image with PyTorch and transformers has already (SKIPPED).
On the machine set VLLM_USE_FLASHINFER_SAMPLER=0. vLLM finds adafuse by its entry point: beside src/ that is src/adafuse.egg-info, which
`pip install -e .` makes here, or there, without network, `python -m pip install --no-deps --no-build-isolation -e .`.
"""

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
KERNELS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
# There already, or not needed: other backends of attention and sampling, video, speculative decoding, builds.
SKIPPED = re.compile(
    "torch.*|numpy|triton|transformers|tokenizers|safetensors|huggingface[-_]hub|sentencepiece|tiktoken|regex|requests|tqdm|psutil|pillow|"
    "pyyaml|sympy|networkx|jinja2|setuptools|ninja|einops|numba|llvmlite|opencv.*|flashinfer.*|tilelang|nvidia-.*|"
    "cuda-.*|fastsafetensors|quack-kernels|tokenspeed-mla|humming-kernels.*|ray|accelerate|peft|datasets|pandas|scipy|"
    "grpcio|uvloop|aiohttp|multidict|yarl|frozenlist|propcache|pygments|rich|sentry-sdk"
)
# vLLM pins it for what is skipped; xgrammar, which vLLM imports at the start, wants a newer one.
UNPINNED = ("apache-tvm-ffi",)
TARGET = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}


def download(requirements, folder):
    """The newest wheels of the target that fit, without what they need."""
    where = ["--python-version", PYTHON, "--only-binary=:all:", *(f"--platform={name}" for name in PLATFORMS)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *where, *requirements]
    subprocess.run(command, check=True)


def needs(wheel, extras):
    """The requirements of a wheel on the target, of those extras too."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        found = Parser().parsestr(files.read(name).decode()).get_all("Requires-Dist", [])
    for requirement in map(Requirement, found):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**TARGET, "extra": extra}) for extra in ("", *extras)):
            yield requirement


def collect(version, folder):
    """vLLM's wheel, and those of all that it needs and the target lacks, level by level: what vLLM pins comes first."""
    level, known = [Requirement(f"vllm=={version}")], {"vllm"}
    while level:
        before = set(folder.glob("*.whl"))
        download([each.name if each.name in UNPINNED else f"{each.name}{each.specifier}" for each in level], folder)
        extras = {name_of(each.name): each.extras for each in level}
        level = []
        for wheel in sorted(set(folder.glob("*.whl")) - before):
            for requirement in needs(wheel, extras.get(name_of(wheel.name.split("-")[0]), ())):
                name = name_of(requirement.name)
                if name not in known and not SKIPPED.fullmatch(name):
                    known.add(name)
                    level.append(requirement)
    return sorted(folder.glob("*.whl"))


def name_of(package):
    return re.sub("[-_.]+", "-", package).lower()


def unpack(wheel, site, capability=None):
    """capability: of the GPU whose code alone is kept; None: all."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name in KERNELS or not _is_left_out(name):
                path = Path(files.extract(name, site))
                if name in KERNELS and capability is not None:
                    path.write_bytes(for_one_gpu(path.read_bytes(), capability))


def _is_left_out(name):
    """Of vLLM what is compiled, and packages in third_party, which it would take for whole; not pynvml, without which it finds no GPU.
    Of mistral_common its vocabularies, 36 MB."""
    package = name.startswith("vllm/third_party/") and name.count("/") > 2
    vocabulary = name.startswith("mistral_common/data/") and not name.endswith(".py")
    return vocabulary or (name.startswith("vllm/") and (".so" in name or package or name == "vllm/vllm-rs"))


# --- code of other GPUs ---------------------------------------------------------------------------------------------------

# A library holds containers of entries, one a GPU that its kernels were compiled for: magic number, version, bytes of this header,
# bytes of all entries; and of an entry kind, version, bytes of its header, bytes of its code, ..., capability.
CONTAINER, ENTRY, CAPABILITY_AT = struct.Struct("<IHHQ"), struct.Struct("<HHIQ"), 28
MAGIC = (0xBA55ED50).to_bytes(4, "little")
PTX, BINARY = 1, 2


def for_one_gpu(library: bytes, capability: int) -> bytes:
    """The same with zeros in the place of code that a GPU of this capability does not read, and so much smaller when packed.

    It reads its own binary, or compiles PTX where there is none.
    """
    found = bytearray(library)
    for entries in containers(library):
        own = (BINARY, capability) in [(kind, of) for kind, of, _ in entries]
        for kind, of, code in entries:
            if (kind == BINARY and of != capability) or (kind == PTX and own):
                found[code] = bytes(code.stop - code.start)
    return bytes(found)


def containers(library: bytes):
    """Of each container its entries: kind, capability, and where the code is (a slice)."""
    at = library.find(MAGIC)
    while at >= 0:
        if at + CONTAINER.size > len(library):
            return
        _, _, header, size = CONTAINER.unpack_from(library, at)
        end, entries, place = at + header + size, [], at + header
        while header == CONTAINER.size and place + CAPABILITY_AT + 4 <= end <= len(library):
            kind, _, before, code = ENTRY.unpack_from(library, place)
            if kind not in (PTX, BINARY) or place + before + code > end:
                break
            (of,) = struct.unpack_from("<I", library, place + CAPABILITY_AT)
            entries.append((kind, of, slice(place + before, place + before + code)))
            place += before + code
        yield entries
        at = library.find(MAGIC, at + 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="0.24.0", help="of vLLM")
    parser.add_argument("--out", required=True, type=Path, help="folder for the parts")
    parser.add_argument("--part", type=int, default=60, help="MiB of a part, at most")
    parser.add_argument(
        "--capability", type=int, help="of the GPU whose code alone is kept: 90 for an H100; default: of all"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site, archive = (Path(scratch) / name for name in ("wheels", "site", "site.tar.xz"))
        wheels.mkdir()
        for wheel in collect(args.version, wheels):
            unpack(wheel, site, args.capability)
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            for path in sorted(site.iterdir()):
                packed.add(path, path.name)
        subprocess.run(["split", "-b", f"{args.part}M", "-d", archive, args.out / "part-"], check=True)
    for part in sorted(args.out.glob("part-*")):
        print(f"{part} {part.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
