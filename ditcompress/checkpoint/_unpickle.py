"""Child process of legacy.py: read a .pt file under limits and write its tensors as safetensors.

Run as a script (SOURCE OUT), because limits on memory and time belong to a process. Prints one JSON object
{"code", "what"} when it refuses. Three guards stand in a row: the archive must be as torch writes it (stored members,
no code), the pickle may name only the harmless classes below (its opcodes are read, not run), and only then torch's
own restricted unpickler runs (torch is imported only then, so that a refusal is quick). A tensor may not claim more
than its file holds, and the checksums, which torch does not look at, must be right.
"""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import resource
import sys
import zipfile
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

MOST_PICKLE_BYTES = 64 << 20
MOST_OPCODES = 2_000_000
MOST_OBJECTS = 1_000_000
MOST_DEPTH = 64
_SLACK = 1 << 20
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_HARMLESS = {
    "collections OrderedDict",
    "argparse Namespace",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char")),
    *(f"torch {kind}Storage" for kind in ("Byte", "Bool")),
}
_BY_STACK = ("STACK_GLOBAL", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # name their class in ways torch never does
_CODE = "it could run code while it is loaded"


def refuse(code: str, what: str) -> NoReturn:
    print(json.dumps({"code": code, "what": what}))
    sys.exit(0)


def scan(stream: IO[bytes] | bytes) -> None:
    """Refuse a pickle that names anything but `_HARMLESS`; nothing is executed."""
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > MOST_OPCODES:
                refuse("E323", f"its pickle has more than {MOST_OPCODES} steps")
            if opcode.name in ("GLOBAL", "INST") and argument not in _HARMLESS:
                refuse("E401", f"wants {str(argument).replace(' ', '.', 1)}: {_CODE}")
            if opcode.name in _BY_STACK:
                refuse("E401", f"wants a class by {opcode.name}: {_CODE}")
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError) as error:
        refuse("E323", f"its pickle is damaged ({error})")


def check_archive(path: str) -> None:
    """The file must be a zip archive exactly as torch writes it."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            refuse_bare(path)
        size = file.seek(-22, os.SEEK_END) + 22 if os.path.getsize(path) > 22 else 0
        if size == 0 or file.read(4) != b"PK\x05\x06":  # a comment or a tail hides a second directory
            refuse("E323", "is no whole torch archive")
    try:
        archive = zipfile.ZipFile(path)
        members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        refuse("E323", f"is no readable torch archive ({error})")
    names = [member.filename for member in members]
    roots = {name.split("/")[0] for name in names}
    pickles = [name for name in names if name.endswith(".pkl")]
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        refuse("E401", f"is a TorchScript program: {_CODE}")
    if len(set(names)) != len(names) or len(roots) != 1 or pickles != [f"{names[0].split('/')[0]}/data.pkl"]:
        refuse("E323", "is not laid out as a torch archive")
    if min(member.header_offset for member in members) != 0:  # zipfile skips what is put before an archive
        refuse("E323", "has data before its archive")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        refuse("E323", "holds compressed or encrypted members, which torch never writes")
    if sum(member.file_size for member in members) > size:
        refuse("E323", "its members claim more bytes than the file has")
    with archive:
        if archive.getinfo(pickles[0]).file_size > MOST_PICKLE_BYTES:
            refuse("E323", f"its pickle is larger than {MOST_PICKLE_BYTES} bytes")
        try:
            scan(archive.read(pickles[0]))
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            refuse("E323", f"is damaged ({error})")
    if damaged is not None:
        refuse("E323", f"the checksum of its member {damaged} is wrong")


def refuse_bare(path: str) -> NoReturn:
    """Say what a file is that is no zip archive: a bare pickle or a tar archive is never loaded."""
    with open(path, "rb") as file:
        head = file.read(512)
        if head[257:262] == b"ustar":
            refuse("E401", f"is a tar archive of pickles: {_CODE}")
        file.seek(0)
        start = file.read(MOST_PICKLE_BYTES)
    try:
        for _ in pickletools.genops(start):
            pass
    except Exception:
        if head[:1] != b"\x80":  # the mark of a pickle since protocol 2
            refuse("E323", "is no torch archive")
    refuse("E401", f"is a bare pickle: {_CODE}")


def limit_time(size: int) -> None:
    """A minute, and a second for each 20 MB."""
    seconds = 60 + size // (20 << 20)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def limit_memory(size: int) -> None:
    """What is in use, three times the file and 1 GB; and an output no larger than the file."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        used = 6 << 30
    for name, value in ((resource.RLIMIT_AS, used + 3 * size + (1 << 30)), (resource.RLIMIT_FSIZE, 2 * size + _SLACK)):
        resource.setrlimit(name, (value, value))


def check_objects(value: Any) -> None:
    """Depth and number of containers, without recursion."""
    count, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        count += 1
        if depth > MOST_DEPTH or count > MOST_OBJECTS:
            refuse("E323", f"is nested deeper than {MOST_DEPTH} or holds more than {MOST_OBJECTS} objects")
        if isinstance(item, argparse.Namespace):
            item = vars(item)
        if isinstance(item, dict):
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, (list, tuple)):
            stack += [(child, depth + 1) for child in item]


def select(value: Any) -> dict[str, Tensor]:
    """The averaged weights of a training checkpoint, else its weights, else the mapping itself."""
    import torch

    if isinstance(value, dict):
        value = next((value[k] for k in ("ema", "model", "state_dict") if isinstance(value.get(k), dict)), value)
    tensors = isinstance(value, dict) and value and all(isinstance(t, torch.Tensor) for t in value.values())
    if not tensors or not all(isinstance(name, str) for name in value):
        refuse("E302", "holds no plain mapping of names to tensors")
    return value


def dense(tensor: Tensor) -> bool:
    """Whether every element has a place of its own and none is left between them."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


def check_tensors(state: dict[str, Tensor], size: int) -> None:
    """Tensors may not claim more than the file holds (a stride of 0 makes terabytes of one number)."""
    import torch

    total = 0
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            refuse("E318", f"tensor {name} is not an ordinary tensor")
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in _DTYPES:
            refuse("E318", f"tensor {name} has dtype {kind}")
        count = tensor.numel() * tensor.element_size()
        if count > tensor.untyped_storage().nbytes() or not dense(tensor):
            refuse("E323", f"tensor {name} claims more values than the file holds")
        total += count
    if total > size * 1.1 + _SLACK:
        refuse("E323", f"its tensors claim {total} bytes, the file has {size}")


def main(source: str, out: str) -> None:
    size = os.path.getsize(source)
    limit_time(size)
    check_archive(source)
    import torch
    from safetensors.torch import save_file

    limit_memory(size)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(source, map_location="cpu", weights_only=True, mmap=False)
        check_objects(value)
        state = select(value)
        check_tensors(state, size)
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, out)
    except MemoryError:
        refuse("E323", "asks for more memory than its size allows")
    except Exception as error:  # whatever torch says of a damaged file; its text proposes to lift the protection
        refuse("E323", f"cannot be read ({type(error).__name__})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
