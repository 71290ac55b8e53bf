"""Attacks on bundles: each damages a good one, and says what must be answered to it.

To try another, add it to `ATTACKS`, or to `LATE_ATTACKS` if it strikes after the bundle was opened.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import tiny

Damage = Callable[[Path], None]
VICTIM = "denoiser.base.safetensors"
SIZE = len(tiny.content(VICTIM))
STEPS = ("schedules", "default", "steps")
SLOW = ("graphs", "denoiser.slow")
SECOND = ("graphs", "text_encoder_2")
TEMPLATE = ("tokenizers", "tokenizer_2", "template")
SIZES = ("image", "sizes")
SIDES = ("image", "sides")
_IMAGE = {"height": 64, "width": 64, "latent_channels": 4, "latent_scale": 8}


class Attack(NamedTuple):
    """`damage` is given the bundle's folder; `error` must stand in the text of the error."""

    name: str
    damage: Damage
    error: str


def put(*path: Any) -> Damage:
    """Set the value at a key path of the manifest: keys and indices, then the value."""
    *parents, last, value = path

    def damage(folder: Path) -> None:
        manifest = place = json.loads((folder / "bundle.json").read_text())
        for key in parents:
            place = place[key]
        place[last] = value
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return damage


def drop(*path: Any) -> Damage:
    """Remove the value at a key path of the manifest."""
    *parents, last = path

    def damage(folder: Path) -> None:
        manifest = place = json.loads((folder / "bundle.json").read_text())
        for key in parents:
            place = place[key]
        del place[last]
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return damage


def text(old: str, new: str) -> Damage:
    """Replace a stretch of the manifest's text."""

    def damage(folder: Path) -> None:
        good = (folder / "bundle.json").read_text()
        assert old in good
        (folder / "bundle.json").write_text(good.replace(old, new, 1))

    return damage


def both(first: Damage, second: Damage) -> Damage:
    """Two damages, one after the other."""

    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


def manifest_is(data: bytes) -> Damage:
    """Replace the whole manifest."""
    return lambda folder: _write(folder / "bundle.json", data)


def file_named(name: str) -> Damage:
    """List a file of that name, and have the decoder read it."""

    def damage(folder: Path) -> None:
        put("files", name, {"size": 3, "sha256": "0" * 64})(folder)
        put("graphs", "decoder", "weights", [name])(folder)

    return damage


def twin(name: str) -> Damage:
    """List a second file whose name is the victim's but for case."""
    return put("files", name, {"size": 3, "sha256": "0" * 64})


def written(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the content of a file."""
    return lambda folder: _write(folder / name, change((folder / name).read_bytes()))


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def renamed(name: str, other: str) -> Damage:
    """Rename a file."""
    return lambda folder: (folder / name).rename(folder / other) and None


def grown_to_4_tb(name: str) -> Damage:
    """Append a hole to a file."""
    return lambda folder: os.truncate(folder / name, 1 << 42)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _link_to_itself_elsewhere(path: Path) -> None:
    outside = path.parent.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


_NOT_REGULAR = "not a regular file; links and folders are not allowed in a bundle"
_NO_NAME = "is no valid name; names are 1 to 64 of A-Z a-z 0-9 . _ -, not . or .."

ATTACKS = [
    # The manifest as a file
    Attack("manifest missing", lambda folder: (folder / "bundle.json").unlink(), "not a bundle, it has no bundle.json"),
    Attack("manifest empty", manifest_is(b""), "bundle.json: not valid JSON"),
    Attack("manifest not JSON", manifest_is(b"format: 1\n"), "bundle.json: not valid JSON"),
    Attack("manifest cut", written("bundle.json", lambda data: data[:-9]), "bundle.json: not valid JSON"),
    Attack("manifest with a tail", written("bundle.json", lambda data: data + b"{}"), "not valid JSON: Extra data"),
    Attack("manifest huge", written("bundle.json", lambda data: data + b" " * (1 << 20)), "more than 1048576 bytes"),
    Attack("manifest of 4 TB", grown_to_4_tb("bundle.json"), "bundle.json: more than 1048576 bytes"),
    Attack("manifest in UTF-16", written("bundle.json", lambda data: data.decode().encode("utf-16")), "not valid JSON"),
    Attack("manifest with a byte order mark", written("bundle.json", lambda data: b"\xef\xbb\xbf" + data), "BOM"),
    Attack(
        "manifest not UTF-8", written("bundle.json", lambda data: data.replace(b"tiny", b"\xff", 1)), "not valid JSON"
    ),
    Attack("manifest nests lists deeply", manifest_is(b"[" * 500_000), "bundle.json: not valid JSON"),
    Attack("manifest nests keys deeply", manifest_is(b'{"format":' * 100_000), "bundle.json: not valid JSON"),
    Attack("manifest is a link", replaced("bundle.json", lambda path: path.symlink_to("/dev/zero")), _NOT_REGULAR),
    Attack("manifest is a link to nothing", replaced("bundle.json", lambda path: path.symlink_to("no")), _NOT_REGULAR),
    Attack("manifest is a folder", replaced("bundle.json", Path.mkdir), _NOT_REGULAR),
    Attack("manifest is a pipe", replaced("bundle.json", os.mkfifo), _NOT_REGULAR),
    Attack("manifest is a list", manifest_is(b"[]"), "bundle.json: expected keys and values, got a list"),
    Attack("key twice", text('"family":', '"family": "x", "family":'), "not valid JSON: key 'family' stands twice"),
    Attack(
        "200000 keys, the last one twice",
        manifest_is(b'{"a":0,' + b",".join(b'"%d":0' % i for i in range(80_000)) + b',"79999":0}'),
        "key '79999' stands twice",
    ),
    # Formats
    Attack(
        "newer format", put("format", 2), "bundle.json: format 2 is newer than 1, which this version reads; upgrade"
    ),
    Attack("newer format with new keys", text('"format": 1', '"format": 7, "new": 1'), "format 7 is newer than 1"),
    Attack("unknown format", put("format", 0), "bundle.json: format 0 is unknown; this version reads 1"),
    Attack("format true", put("format", True), "format: expected a whole number, got true or false (True)"),
    Attack("format is text", put("format", "1"), "format: expected a whole number, got text ('1')"),
    Attack("format 1.0", put("format", 1.0), "format: expected a whole number, got a number (1.0)"),
    Attack("format missing", drop("format"), "bundle.json: format: missing"),
    # Keys and types
    Attack(
        "misspelt key",
        put("graphs", "decoder", "inputs", 0, "dtpye", "float32"),
        "bundle.json: graphs.decoder.inputs[0].dtpye: unknown key; did you mean 'dtype'?",
    ),
    Attack(
        "key that moves the cursor", put("\x1b[2J\r", 1), "bundle.json: '\\x1b[2J\\r': unknown key; known: format, name"
    ),
    Attack("empty key", put("", 1), "bundle.json: '': unknown key"),
    Attack("long key", put("x" * 9999, 1), "xxx...: unknown key"),
    Attack("key missing", drop("image", "height"), "bundle.json: image.height: missing"),
    Attack("null", put("schedules", None), "bundle.json: schedules: expected keys and values, got nothing"),
    Attack("list for keys", put("graphs", []), "bundle.json: graphs: expected keys and values, got a list"),
    Attack("keys for list", put(*STEPS, {}), "schedules.default.steps: expected a list, got keys and values"),
    Attack("number for text", put("name", 5), "bundle.json: name: expected text, got a whole number (5)"),
    Attack("text for number", put("image", "width", "64"), "image.width: expected a whole number, got text ('64')"),
    Attack(
        "true for size", put("files", VICTIM, "size", True), f"files.{VICTIM}.size: expected a whole number, got true"
    ),
    Attack("true for scale", put("guidance", "scale", True), "guidance.scale: expected a number, got true or false"),
    Attack(
        "true in shape", put(*SLOW, "inputs", 0, "shape", [True]), "inputs[0].shape[0]: expected a whole number or text"
    ),
    Attack("fraction in shape", put(*SLOW, "inputs", 0, "shape", [1.5]), "shape[0]: expected a whole number or text"),
    Attack(
        "unknown dtype", put(*SLOW, "inputs", 0, "dtype", "f32"), "inputs[0].dtype: expected one of float32, float16"
    ),
    Attack("list for dtype", put(*SLOW, "inputs", 0, "dtype", []), "inputs[0].dtype: expected one of float32, float16"),
    Attack("NaN", put("guidance", "scale", float("nan")), "guidance.scale: expected a finite number, got nan"),
    Attack(
        "Infinity", put(*STEPS, 0, "timestep", float("inf")), "steps[0].timestep: expected a finite number, got inf"
    ),
    Attack("infinity in digits", text('"scale": 4.0', '"scale": 1e999'), "scale: expected a finite number, got inf"),
    Attack(
        "half a surrogate pair", put("guidance", "negative_prompt", "\ud800"), "negative_prompt: '\\ud800' is not valid"
    ),
    Attack(
        "half a surrogate pair in a key", put("provenance", "tools", "\ud800", "1"), "'\\ud800' is not valid Unicode"
    ),
    # Numbers that ask for too much
    Attack("a million digits", text('"height": 64', '"height": 1' + "0" * 900_000), "a whole number of 900001 digits"),
    Attack(
        "20 digits", text('"height": 64', '"height": 99999999999999999999'), "image.height: expected a whole number"
    ),
    Attack(
        "a billion pixels",
        put("image", "height", 1_000_000_000),
        "image.height: expected a whole number from 1 to 8192",
    ),
    Attack("no pixels", put("image", "width", 0), "image.width: expected a whole number from 1 to 8192, got 0"),
    Attack(
        "negative pixels", put("image", "width", -64), "image.width: expected a whole number from 1 to 8192, got -64"
    ),
    Attack(
        "not a multiple", put("image", "height", 60), "image.height: expected a multiple of latent_scale, 8; got 60"
    ),
    Attack("latent scale 0", put("image", "latent_scale", 0), "image.latent_scale: expected a whole number from 1"),
    Attack(
        "latents of 2 TB",
        put("image", {"height": 8192, "width": 8192, "latent_channels": 8192, "latent_scale": 1}),
        "image.latent_channels: expected at most 268435456 elements, got 549755813888",
    ),
    Attack(
        "huge dimension", put(*SLOW, "inputs", 0, "shape", [2**40]), "inputs[0].shape[0]: expected a whole number from"
    ),
    Attack("dimension 0", put(*SLOW, "inputs", 0, "shape", [0]), "inputs[0].shape[0]: expected a whole number from 1"),
    Attack(
        "huge tensor", put(*SLOW, "inputs", 0, "shape", [65536, 65536]), "inputs[0].shape: expected at most 268435456"
    ),
    Attack(
        "65 dimensions", put(*SLOW, "inputs", 0, "shape", [1] * 65), "inputs[0].shape: rank: expected a whole number"
    ),
    Attack("dimension without a name", put(*SLOW, "inputs", 0, "shape", [""]), "inputs[0].shape[0]: '' is not 1 to 64"),
    Attack(
        "endless prompt", put("tokenizers", "tokenizer", "max_length", 2**31), "max_length: expected a whole number"
    ),
    Attack("prompt of nothing", put("tokenizers", "tokenizer", "max_length", 0), "max_length: expected a whole number"),
    Attack(
        "negative padding", put("tokenizers", "tokenizer", "pad_token_id", -1), "pad_token_id: expected a whole number"
    ),
    Attack(
        "endless schedule",
        put(*STEPS, [{"phase": "slow", "timestep": 1, "coefficients": [1, 1, 1]}] * 2000),
        "schedules.default.steps: their number: expected a whole number from 1 to 1000, got 2000",
    ),
    Attack(
        "beyond float32", put(*STEPS, 1, "coefficients", 2, 1e39), "coefficients[2]: expected a number that float32"
    ),
    Attack("noise beyond float32", put("schedules", "default", "initial_noise_scale", 1e300), "a number that float32"),
    Attack("negative size", put("files", VICTIM, "size", -1), f"files.{VICTIM}.size: expected a whole number from 0"),
    Attack("size beyond 64 bits", put("files", VICTIM, "size", 2**63), f"files.{VICTIM}.size: expected a whole number"),
    Attack(
        "hash not hexadecimal", put("files", VICTIM, "sha256", "g" * 64), f"files.{VICTIM}.sha256: expected 64 hexa"
    ),
    Attack("hash in capitals", put("files", VICTIM, "sha256", "A" * 64), f"files.{VICTIM}.sha256: expected 64 hexa"),
    Attack(
        "hash with a newline", put("files", VICTIM, "sha256", "0" * 64 + "\n"), f"files.{VICTIM}.sha256: expected 64"
    ),
    Attack(
        "hash of digits beyond ASCII",
        put("files", VICTIM, "sha256", "\u0660" * 64),
        f"files.{VICTIM}.sha256: expected 64",
    ),
    # Names
    *(
        Attack(f"file named {name[:20]!a}", file_named(name), f"files: {name!r} {_NO_NAME}")
        for name in (
            "..",
            ".",
            "",
            "../outside",
            "/etc/passwd",
            "folder/file",
            "folder\\file",
            "C:file",
            "a b",
            "a\0b",
            "a\n",
            "decοder.onnx",  # noqa: RUF001 - the o is Greek
            "ｄecoder.onnx",  # noqa: RUF001 - the d is full width
            "decoder\u202exnno",
            "decoder.onnx\u200b",
        )
    ),
    Attack("file with a long name", file_named("a" * 65), _NO_NAME),
    Attack("file named nul.onnx", file_named("nul.onnx"), "files: 'nul.onnx' cannot be a file's name on Windows"),
    Attack("file named COM1", file_named("COM1"), "files: 'COM1' cannot be a file's name on Windows"),
    Attack(
        "file that ends in a dot", file_named("decoder.onnx."), "'decoder.onnx.' cannot be a file's name on Windows"
    ),
    Attack("manifest lists itself", file_named("bundle.json"), "files: 'bundle.json' and 'bundle.json' are one file"),
    Attack("manifest in capitals", file_named("Bundle.JSON"), "files: 'Bundle.JSON' and 'bundle.json' are one file"),
    Attack("two names but for case", twin("Decoder.onnx"), "files: 'Decoder.onnx' and 'decoder.onnx' are one file"),
    Attack("bundle named ..", put("name", ".."), f"name: '..' {_NO_NAME}"),
    Attack("target named ../x", put("engines", "../x", {}), "engines.../x.backend: missing"),
    Attack(
        "target with a slash",
        put("engines", "a/b", {"backend": "tensorrt", "dtype": "float16", "graphs": {}}),
        f"engines: 'a/b' {_NO_NAME}",
    ),
    Attack(
        "schedule with a slash",
        put("schedules", "a/b", {"steps": []}),
        "schedules.a/b.steps: a schedule needs at least",
    ),
    Attack("input with a space", put(*SLOW, "inputs", 0, "name", "a b"), "inputs[0].name: 'a b' is no valid name"),
    Attack("two inputs of one name", put(*SLOW, "inputs", 1, "name", "latents"), "inputs: 'latents' stands twice"),
    # References
    Attack(
        "tokenizer not listed", put("tokenizers", "tokenizer", "file", "no"), "tokenizers.tokenizer.file: 'no' is not"
    ),
    Attack("graph not listed", put(*SLOW, "files", "float32", "no"), "graphs.denoiser.slow.files.float32: 'no' is not"),
    Attack("weights not listed", put(*SLOW, "weights", 1, "no"), "graphs.denoiser.slow.weights[1]: 'no' is not listed"),
    Attack(
        "weights outside",
        put(*SLOW, "weights", 1, "../../secret"),
        "graphs.denoiser.slow.weights[1]: '../../secret' is not listed under files",
    ),
    Attack(
        "engine not listed",
        put("engines", "cpu", "graphs", "decoder", "file", "/bin/sh"),
        "engines.cpu.graphs.decoder.file: '/bin/sh' is not listed under files",
    ),
    Attack(
        "engine's weights not listed",
        put("engines", "cpu", "graphs", "decoder", "weights", ["no"]),
        "engines.cpu.graphs.decoder.weights[0]: 'no' is not listed under files",
    ),
    Attack(
        "engine of no graph", put("engines", "cpu", "graphs", "x", {"file": "decoder.onnx"}), "graphs.x: no such graph"
    ),
    Attack("engine missing", drop("engines", "cpu", "graphs", "decoder"), "engines.cpu.graphs.decoder: missing"),
    Attack("no decoder", drop("graphs", "decoder"), "graphs.decoder: missing"),
    Attack(
        "graph of no kind", put("graphs", "x", {"inputs": [], "outputs": [], "files": {}}), "graphs.x.inputs: empty"
    ),
    Attack("no graphs", put("graphs", {}), "graphs.text_encoder: missing"),
    Attack(
        "graph of unknown dtype", put(*SLOW, "files", "int64", "decoder.onnx"), "slow.files: got 'int64', expected one"
    ),
    Attack("no schedules", put("schedules", {}), "schedules: empty"),
    Attack("no steps", put(*STEPS, []), "schedules.default.steps: a schedule needs at least one step"),
    Attack("phase without a graph", put(*STEPS, 1, "phase", "x"), "steps[1].phase: there is no graph 'denoiser.x'"),
    Attack(
        "phase that is a path", put(*STEPS, 1, "phase", "../x"), "steps[1].phase: there is no graph 'denoiser.../x'"
    ),
    Attack("too few coefficients", put(*STEPS, 0, "coefficients", [1, 2]), "steps[0].coefficients: expected 3 numbers"),
    Attack(
        "too many coefficients", put(*STEPS, 0, "coefficients", [1] * 4), "steps[0].coefficients: expected 3 numbers"
    ),
    Attack(
        "graph takes other coefficients", put(*SLOW, "inputs", 2, "shape", [4]), "steps[0].coefficients: 3 numbers, for"
    ),
    Attack(
        "input without a source", put(*SLOW, "inputs", 0, "source", ""), "inputs[0].source: got '', expected one of"
    ),
    Attack(
        "input from nowhere", put(*SLOW, "inputs", 4, "source", "condition.x"), "inputs[4].source: got 'condition.x'"
    ),
    Attack(
        "encoder that feeds itself",
        put("graphs", "text_encoder", "inputs", 0, "source", "condition.prompt_embeds"),
        "got",
    ),
    Attack("no tokenizer", put("tokenizers", {}), "expected one of none, for there is no tokenizer"),
    Attack(
        "no such tokenizer",
        drop("tokenizers", "tokenizer"),
        "text_encoder.inputs[0].source: got 'tokens.tokenizer', expected one of tokens.tokenizer_2, mask.tokenizer_2",
    ),
    Attack(
        "source of an output", put(*SLOW, "outputs", 0, "source", "latents"), "outputs[0].source: an output has none"
    ),
    Attack("negative without a scale", drop(*SLOW, "inputs", 3), "a negative condition, but no guidance_scale"),
    # Several text encoders, and what they take
    Attack(
        "text encoder of two digits",
        text('"text_encoder_2": {\n   "inputs"', '"text_encoder_22": {\n   "inputs"'),
        "graphs.text_encoder_22: expected text_encoder, text_encoder_<number>, encoder, decoder or denoiser.<phase>",
    ),
    Attack("only a second text encoder", drop("graphs", "text_encoder"), "got 'condition.prompt_embeds', expected one"),
    Attack(
        "two conditions of one name",
        put(*SECOND, "outputs", 0, "name", "prompt_embeds"),
        "graphs.denoiser.slow.inputs[6].source: got 'condition.mask', expected one of",
    ),
    Attack(
        "two conditions of one name, one unused",
        put(*SECOND, "outputs", [{"name": name, "dtype": "int64", "shape": [1]} for name in ("mask", "prompt_embeds")]),
        "graphs: outputs of text encoders: 'prompt_embeds' stands twice",
    ),
    Attack(
        "mask of no tokenizer",
        put(*SECOND, "inputs", 1, "source", "mask.x"),
        "inputs[1].source: got 'mask.x', expected",
    ),
    Attack(
        "mask of another kind",
        put(*SECOND, "inputs", 1, "dtype", "float32"),
        "text_encoder_2.inputs[1].dtype: mask.tokenizer_2 is int64, got float32",
    ),
    Attack(
        "tokens of another kind", put(*SECOND, "inputs", 0, "dtype", "uint8"), "tokens.tokenizer_2 is int64, got uint8"
    ),
    Attack(
        "condition of another kind",
        put(*SLOW, "inputs", 6, "dtype", "float32"),
        "denoiser.slow.inputs[6].dtype: condition.mask is int64, got float32",
    ),
    Attack(
        "mask for a denoiser", put(*SLOW, "inputs", 6, "source", "mask.tokenizer"), "inputs[6].source: got 'mask.tokeni"
    ),
    Attack("template without a prompt", put(*TEMPLATE, "draw"), "template: 'draw' does not hold {} once"),
    Attack("template with two", put(*TEMPLATE, "{} {}"), "tokenizer_2.template: '{} {}' does not hold {} once"),
    Attack("template of nothing", put(*TEMPLATE, ""), "tokenizer_2.template: '' does not hold {} once"),
    Attack("template that is a list", put(*TEMPLATE, ["{}"]), "tokenizer_2.template: expected text, got a list"),
    # Images from images
    Attack(
        "encoder without an image", drop("graphs", "encoder", "inputs", 0), "graphs.encoder.inputs: none is the image"
    ),
    Attack(
        "encoder of text", put("graphs", "encoder", "inputs", 0, "source", "tokens.tokenizer"), "one of image, noise"
    ),
    Attack(
        "image of another kind",
        put("graphs", "encoder", "inputs", 0, "dtype", "float32"),
        "encoder.inputs[0].dtype: image is uint8, got float32",
    ),
    Attack("decoder of an image", put("graphs", "decoder", "inputs", 0, "source", "image"), "expected one of latents"),
    Attack("encoder without an engine", drop("engines", "cpu", "graphs", "encoder"), "cpu.graphs.encoder: missing"),
    Attack("step without a mix", drop(*STEPS, 1, "mix"), "steps[1].mix: missing; the graph encoder makes it possible"),
    Attack("mix of one number", put(*STEPS, 1, "mix", [1.0]), "steps[1].mix: expected two numbers, got 1"),
    Attack("mix of three numbers", put(*STEPS, 1, "mix", [1.0] * 3), "steps[1].mix: expected two numbers, got 3"),
    Attack("mix beyond float32", put(*STEPS, 1, "mix", [0, -1e39]), "steps[1].mix[1]: expected a number that float32"),
    Attack("mix of texts", put(*STEPS, 1, "mix", ["0", 1]), "steps[1].mix[0]: expected a number, got text ('0')"),
    Attack(
        "strength rounded otherwise",
        put("schedules", "large", "strength_rounding", "nearest"),
        "large.strength_rounding: expected one of down, up; got text ('nearest')",
    ),
    # Sizes
    Attack(
        "size of three sides", put(*SIZES, 0, [64, 64, 3]), "image.sizes[0]: expected [height, width], got [64, 64, 3]"
    ),
    Attack("size of nothing", put(*SIZES, 0, []), "image.sizes[0]: expected [height, width], got []"),
    Attack("size of a billion", put(*SIZES, 1, [64, 10**9]), "image.sizes[1]: expected a whole number from 1 to 8192"),
    Attack("size 0", put(*SIZES, 1, [0, 64]), "image.sizes[1]: expected a whole number from 1 to 8192, got 0"),
    Attack(
        "size of a fraction", put(*SIZES, 1, [64.5, 64]), "image.sizes[1][0]: expected a whole number, got a number"
    ),
    Attack(
        "size that is no multiple",
        put(*SIZES, 1, [64, 60]),
        "image.sizes[1]: expected a multiple of latent_scale, 8; got",
    ),
    Attack(
        "a size's latents of 2 GB",
        put("image", {**_IMAGE, "latent_channels": 512, "sizes": [[8192, 8192]]}),
        "image.latent_channels: expected at most 268435456 elements, got 536870912",
    ),
    Attack(
        "sides whose latents are of 2 GB",
        put("image", {**_IMAGE, "latent_channels": 512, "sides": [8, 8192, 8]}),
        "image.latent_channels: expected at most 268435456 elements, got 536870912",
    ),
    Attack(
        "sides of two numbers", put(*SIDES, [64, 128]), "image.sides: expected [lowest, highest, multiple], got [64,"
    ),
    Attack(
        "sides upside down", put(*SIDES, [128, 64, 8]), "image.sides: expected [lowest, highest, multiple], got [128"
    ),
    Attack(
        "sides from 0", put(*SIDES, [0, 64, 8]), "image.sides: expected [lowest, highest, multiple], got [0, 64, 8]"
    ),
    Attack("sides without end", put(*SIDES, [64, 2**40, 8]), "image.sides: expected [lowest, highest, multiple], got"),
    Attack("sides of multiple 0", put(*SIDES, [64, 128, 0]), "image.sides: 0 is not a multiple of latent_scale, 8"),
    Attack(
        "sides of negative multiple", put(*SIDES, [64, 128, -8]), "image.sides: -8 is not a multiple of latent_scale"
    ),
    Attack("sides between latents", put(*SIDES, [64, 128, 4]), "image.sides: 4 is not a multiple of latent_scale, 8"),
    Attack("sides off their multiple", put(*SIDES, [64, 120, 16]), "image.sides: 16 is not a multiple of latent_scale"),
    Attack("tile of one number", put("image", "tile", [128]), "image.tile: expected [side, overlap], got [128]"),
    Attack(
        "tile that overlaps whole", put("image", "tile", [64, 64]), "image.tile: expected [side, overlap], got [64, 64]"
    ),
    Attack(
        "tile of negative overlap", put("image", "tile", [64, -8]), "image.tile: expected [side, overlap], got [64, -8]"
    ),
    Attack(
        "tile without end", put("image", "tile", [2**40, 8]), "image.tile: expected [side, overlap], got [1099511627776"
    ),
    Attack(
        "tile between latents", put("image", "tile", [64, 4]), "image.tile: expected a multiple of latent_scale, 8; got"
    ),
    Attack(
        "schedule for no size of image",
        put("schedules", "large", "sizes", 0, [8, 8]),
        "schedules.large.sizes[0]: [8, 8] is no size of image",
    ),
    Attack(
        "size without a schedule",
        both(put("schedules", "default", "sizes", [[64, 64]]), put("schedules", "large", "sizes", [[64, 128]])),
        "schedules: none is for [256, 256], a size of image",
    ),
    Attack(
        "sides without a schedule",
        put("schedules", "default", "sizes", [[64, 64]]),
        "schedules: image.sides allows any size in a range, and none is for all sizes",
    ),
    Attack(
        "usual size without a schedule",
        put("schedules", "default", "sizes", [[64, 128]]),
        "schedules: none is for [64, 64], a size of image",
    ),
    # Files
    Attack("file missing", lambda folder: (folder / VICTIM).unlink(), f"{VICTIM}: missing; build the bundle again"),
    Attack("file cut", written(VICTIM, lambda data: data[:-1]), f"{VICTIM}: {SIZE - 1} bytes, expected {SIZE}"),
    Attack("file grown", written(VICTIM, lambda data: data + b"\n"), f"{VICTIM}: {SIZE + 1} bytes, expected {SIZE}"),
    Attack("file grown to 4 TB", grown_to_4_tb(VICTIM), f"{VICTIM}: 4398046511104 bytes, expected {SIZE}"),
    Attack("file altered", written(VICTIM, _flip), f"{VICTIM}: altered (its SHA-256 is not the listed one)"),
    Attack("file altered in the manifest", put("files", VICTIM, "sha256", "0" * 64), f"{VICTIM}: altered"),
    Attack(
        "file not listed", lambda folder: _write(folder / "a.so", b""), "'a.so' is not listed in bundle.json; remove it"
    ),
    Attack("hidden file not listed", lambda folder: _write(folder / ".a", b""), "'.a' is not listed in bundle.json"),
    Attack("folder not listed", lambda folder: (folder / "f").mkdir(), "'f' is not listed in bundle.json"),
    Attack(
        "file not listed, of no valid text",
        lambda folder: _write(Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b")), b""),
        "'\\udcff\\x1b' is not listed in bundle.json",
    ),
    Attack(
        "file renamed in case", renamed("decoder.onnx", "Decoder.onnx"), "'Decoder.onnx' is not listed in bundle.json"
    ),
    Attack("link within", replaced(VICTIM, lambda path: path.symlink_to("decoder.onnx")), _NOT_REGULAR),
    Attack("link out, to the same content", lambda folder: _link_to_itself_elsewhere(folder / VICTIM), _NOT_REGULAR),
    Attack("link to nothing", replaced(VICTIM, lambda path: path.symlink_to("no")), _NOT_REGULAR),
    Attack("link to itself", replaced(VICTIM, lambda path: path.symlink_to(path)), _NOT_REGULAR),
    Attack("folder for a file", replaced(VICTIM, Path.mkdir), _NOT_REGULAR),
    Attack("pipe for a file", replaced(VICTIM, os.mkfifo), _NOT_REGULAR),
    Attack("socket for a file", replaced(VICTIM, _socket), _NOT_REGULAR),
]

LATE_ATTACKS = [
    Attack("removed", lambda folder: (folder / VICTIM).unlink(), f"{VICTIM}: No such file or directory"),
    Attack("altered", written(VICTIM, _flip), f"{VICTIM}: altered"),
    Attack("replaced", replaced(VICTIM, lambda path: path.write_bytes(b"x" * SIZE)), f"{VICTIM}: altered"),
    Attack("cut", written(VICTIM, lambda data: data[:-1]), f"{VICTIM}: {SIZE - 1} bytes, expected {SIZE}"),
    Attack("grown to 4 TB", grown_to_4_tb(VICTIM), f"{VICTIM}: 4398046511104 bytes, expected {SIZE}"),
    Attack("replaced by an endless link", replaced(VICTIM, lambda path: path.symlink_to("/dev/zero")), _NOT_REGULAR),
    Attack("replaced by a link out", lambda folder: _link_to_itself_elsewhere(folder / VICTIM), _NOT_REGULAR),
    Attack("replaced by a folder", replaced(VICTIM, Path.mkdir), _NOT_REGULAR),
    Attack("replaced by a pipe", replaced(VICTIM, os.mkfifo), _NOT_REGULAR),
]
