"""Headers that lie: nothing is allocated from a number that the file does not bear out."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditcompress.checkpoint.header import MOST_TENSORS, read_header, read_tensor
from ditcompress.errors import DitcompressError

from .faults import entry, failure, header

LONG = "n" * 513


@pytest.mark.parametrize(
    ("content", "code", "mention"),
    [
        (b"", "E312", "0 bytes"),
        (b"\x01\x02", "E312", "2 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", "E310", str(2**40)),
        (struct.pack("<Q", 2**64 - 1), "E310", "header"),
        (struct.pack("<Q", 900) + b"{}", "E312", "908"),
        (struct.pack("<Q", 0), "E310", "{"),
        (header("not json"), "E310", "{"),
        (header(' {"a": 1}'), "E310", "{"),
        (header('{"a": 1'), "E310", "not JSON"),
        (header('{"a": {"dtype": NaN}}'), "E310", "NaN"),
        (header('{"a":' * 3000), "E310", "not JSON"),
        (header("[1]"), "E310", "{"),
        (header('{"\xff": 1}'.encode("latin-1").decode("latin-1")), "E310", "entry"),
        (header({"a": 5}), "E310", "a"),
        (header({"a": {**entry(0, 4, [1]), "x": 1}}, bytes(4)), "E310", "entry"),
        (header({"__metadata__": {"k": 1}}), "E310", "__metadata__"),
        (header({"__metadata__": []}), "E310", "__metadata__"),
        (header({"a": entry(0, 8, [1])}, bytes(8)), "E310", "needs 4"),
        (header({"a": entry(4, 8, [1])}, bytes(8)), "E310", "hole"),
        (header({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "E310", "overlap"),
        (header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "E310", "overlap"),
        (header({"a": entry(0, 4, [1])}, bytes(9)), "E310", "5 bytes after"),
        (header({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)), "E310", "4 bytes"),
        (header({"a": entry(0, 0, [0, 2**63])}), "E310", "counts"),
        (header({"a": entry(0, 4, [-1])}, bytes(4)), "E310", "counts"),
        (header({"a": entry(0, 4, [1.0])}, bytes(4)), "E310", "counts"),
        (header({"a": entry(0, 4, [True])}, bytes(4)), "E310", "counts"),
        (header({"a": entry(0, 4, ["1"])}, bytes(4)), "E310", "counts"),
        (header({"a": entry(8, 4, [1])}, bytes(8)), "E310", "bytes"),
        (header({"a": entry(0, 4, [1] * 17)}, bytes(4)), "E310", "counts"),
        (header({"a\x1b[31m": entry(0, 4, [1])}, bytes(4)), "E310", "name"),
        (header({"a\nb": entry(0, 4, [1])}, bytes(4)), "E310", "name"),
        (header({"a\0b": entry(0, 4, [1])}, bytes(4)), "E310", "name"),
        (header({"": entry(0, 4, [1])}, bytes(4)), "E310", "name"),
        (header({LONG: entry(0, 4, [1])}, bytes(4)), "E310", "name"),
        (
            header(f'{{"a":{json.dumps(entry(0, 4, [1]))},"a":{json.dumps(entry(0, 4, [1]))}}}', bytes(4)),
            "E310",
            "twice",
        ),
        (header({"a": entry(0, 8, [1], "C64")}, bytes(8)), "E318", "C64"),
        (header({"a": entry(0, 1, [2], "F4")}, bytes(1)), "E318", "F4"),
        (header({"a": entry(0, 4, [1], None)}, bytes(4)), "E318", "None"),
        (header({"a": entry(0, 4, [1], [1])}, bytes(4)), "E318", "[1]"),
        (header({"a": entry(0, 400, [100])}, bytes(4)), "E312", "needs"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value)[:24],
)
def test_a_header_that_lies_is_caught(tmp_path: Path, content: bytes, code: str, mention: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    failure(lambda: read_header(tmp_path / "w.safetensors"), code, "w.safetensors", mention)


def test_too_many_tensors_are_refused_quickly(tmp_path: Path) -> None:
    text = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(MOST_TENSORS + 1))
    (tmp_path / "w.safetensors").write_bytes(header("{" + text + "}"))
    start = time.monotonic()
    failure(lambda: read_header(tmp_path / "w.safetensors"), "E310", str(MOST_TENSORS))
    assert time.monotonic() - start < 10


def test_a_sparse_file_of_a_terabyte_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(header({"a": entry(0, 2**40, [2**38])}))
    os.truncate(file, file.stat().st_size + 2**40 - 1)
    failure(lambda: read_header(file), "E312", f"needs {file.stat().st_size + 1}")


def test_random_damage_to_a_header_is_an_error_or_harmless(tmp_path: Path) -> None:
    """1000 seeded mutants: each fails with a code of ours, or still describes exactly the bytes of the file."""
    file = tmp_path / "w.safetensors"
    save_file({"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(4, dtype=torch.float16)}, file)
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(length)] = generator.randrange(256)
        file.write_bytes(data)
        try:
            entries, _ = read_header(file)
        except DitcompressError as error:
            assert error.code in ("E310", "E312", "E318") and error.line().isprintable()
            refused += 1
        else:
            assert sum(e.stop - e.start for e in entries.values()) == len(whole) - length
            assert all(read_tensor(e).shape == e.shape for e in entries.values())
    assert refused > 500


def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    small = (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(kind): torch.arange(6).reshape(3, 2).to(kind) for kind in (*kinds, *small)}
    save_file({**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, file)
    entries, _ = read_header(file)
    for name, expected in load_file(file).items():
        found = read_tensor(entries[name])
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert found.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist()


def test_a_boolean_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(header({"mask": entry(0, 2, [2], "BOOL")}, b"\x01\x02"))
    entries, _ = read_header(tmp_path / "w.safetensors")
    failure(lambda: read_tensor(entries["mask"]), "E323", "mask", "w.safetensors")
