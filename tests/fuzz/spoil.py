"""Hostile checkpoints: a file name to its bytes, or to where a link of that name points."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.mutate import HOSTILE, Pairs, Raw, dump, parse, spoiled, spoiled_bytes

Files = Mapping[str, bytes | Path | None]
"""None takes a file away."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def lay_out(directory: Path, whole: Mapping[str, bytes], changed: Files) -> None:
    """Write a checkpoint with some files changed."""
    for file in directory.iterdir():
        file.unlink()
    for name, data in {**whole, **changed}.items():
        if isinstance(data, Path):
            (directory / name).symlink_to(data)
        elif data is not None:
            (directory / name).write_bytes(data)


@st.composite
def weights(draw: st.DrawFn, data: bytes, name: str = WEIGHTS) -> Files:
    """Return safetensors whose header lies in some way, or whose bytes are spoiled."""
    how = draw(st.sampled_from(("header", "header", "header", "spans", "length", "values", "bytes", "none")))
    size = int.from_bytes(data[:8], "little")
    header, body = parse(data[8 : 8 + size]), data[8 + size :]
    if how == "none":
        return {}
    if how == "bytes":
        return {name: draw(spoiled_bytes(data))}
    if how == "length":
        lengths = (0, 1, 2, size - 1, size + 1, size + 8, len(data), 10**8, 10**8 + 1, 2**31, 2**60, 2**63, 2**64 - 1)
        length = draw(st.sampled_from(lengths))
        return {name: length.to_bytes(8, "little") + data[8:]}
    if how == "values":
        values = bytearray(body)
        at = 4 * draw(st.integers(0, len(body) // 4 - 1))
        values[at : at + 4] = draw(st.sampled_from((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\xff\xff")))
        return {name: data[: 8 + size] + bytes(values)}
    if how == "spans":
        header = draw(_lying_spans(header, len(body)))
    else:
        header = draw(spoiled(header, ("shape", "data_offsets", "dtype")))
    text = dump(header).encode("utf-8", "surrogatepass")
    return {name: len(text).to_bytes(8, "little") + text + body}


@st.composite
def _lying_spans(draw: st.DrawFn, header: Pairs, size: int) -> Pairs:
    """Return a header whose tensors overlap, leave holes, lie outside, or have shapes that overflow."""
    header = Pairs([key, Pairs(list(map(list, entry)))] for key, entry in header)
    names = [index for index, (key, _) in enumerate(header) if key != "__metadata__"]
    chosen = header[draw(st.sampled_from(names))][1]
    fields = {key: index for index, (key, _) in enumerate(chosen)}
    begin, end = chosen[fields["data_offsets"]][1]
    spans = (
        [0, end - begin],
        [end, begin],
        [begin, size + 8],
        [-8, end - begin - 8],
        [begin, begin],
        [begin + 4, end + 4],
    )
    spans += ([2**63, 2**63 + end - begin], [begin, 2**64 + end], [begin], [begin, end, end], [float(begin), end])
    shapes = (
        [2**32, 2**32],
        [2**63, 2],
        [2**62, 4],
        [0, 2**63],
        [-1, -(end - begin) // 4],
        [end - begin],
        [],
        [1] * 500,
    )
    shapes += ([(end - begin) // 4, 0.5], [Raw("1e3")], "16", [[16]], [True, (end - begin) // 4], [None])
    dtypes = ("F4", "F8_E4M3", "F8_E8M0", "U16", "U32", "U64", "C64", "I64", "F32", "f32", "", "BOOL", "F64", None, 7)
    which = draw(st.sampled_from(("data_offsets", "shape", "dtype", "same")))
    if which == "same":  # a name twice, or two tensors at one place
        header.append([draw(st.sampled_from([header[i][0] for i in names])), chosen])
    else:
        options = {"data_offsets": spans, "shape": shapes, "dtype": dtypes}[which]
        chosen[fields[which]] = [which, draw(st.sampled_from(options))]
    return header


@st.composite
def indexes(draw: st.DrawFn, data: bytes, outside: Path) -> Files:
    """Return an index, with a lie in it or not, over one to three shards, one of which may be a link."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    count = draw(st.integers(1, 3))
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    changed: dict[str, bytes | Path | None] = {WEIGHTS: None}
    for number, file in enumerate(files):
        part, bytes_of_part = {}, b""
        for name in names[number::count]:
            begin, end = header[name]["data_offsets"]
            at = len(bytes_of_part)
            bytes_of_part += body[begin:end]
            part[name] = {**header[name], "data_offsets": [at, at + end - begin]}
        text = json.dumps(part).encode()
        changed[file] = len(text).to_bytes(8, "little") + text + bytes_of_part
    weight_map = Pairs([name, files[index % count]] for index, name in enumerate(names))
    tree = Pairs([["metadata", Pairs([["total_size", len(body)]])], ["weight_map", weight_map]])
    how = draw(st.sampled_from(("none", "place", "tree", "bytes", "link", "link", "twice")))
    if how == "place":
        hostile = (
            "/etc/passwd",
            "../dense/model.safetensors",
            "..",
            ".",
            "",
            "a/b.safetensors",
            f"./{files[0]}",
            "a\\b",
        )
        hostile += ("config.json", INDEX, "no-such.safetensors", "a\x00b", "\ud800", "x" * 300, files[-1], str(outside))
        weight_map[draw(st.integers(0, len(weight_map) - 1))][1] = draw(st.sampled_from(hostile))
    elif how == "tree":
        tree = draw(spoiled(tree, ("weight_map", "metadata")))
    elif how == "twice":
        weight_map.append([names[0], draw(st.sampled_from(files))])
    elif how == "link":
        chosen = draw(st.sampled_from(files))
        shard = changed[chosen]
        assert isinstance(shard, bytes)
        outside.write_bytes(shard)
        targets = (outside, Path("/etc/passwd"), Path(chosen), Path("loop"), Path("/dev/zero"), Path("/proc/self/mem"))
        target = draw(st.sampled_from((*targets, Path("inside"), Path("nowhere"))))
        changed[chosen] = target
        if target == Path("inside"):
            changed["inside"] = shard
        if target == Path("loop"):
            changed["loop"] = Path(chosen)
    text = dump(tree).encode()
    changed[INDEX] = draw(spoiled_bytes(text)) if how == "bytes" else text
    return changed


@st.composite
def documents(draw: st.DrawFn, data: bytes, name: str, keys: tuple[str, ...] = (), most: int = 3) -> Files:
    """Return one JSON file of a checkpoint, spoiled as a tree or as bytes."""
    how = draw(st.sampled_from(("tree",) * 6 + ("bytes", "none", "other")))
    if how == "none":
        return {}
    if how == "bytes":
        return {name: draw(spoiled_bytes(data))}
    if how == "other":
        return {name: draw(st.sampled_from((b"", b"null", b"[]", b"7", b"\xff\xfe{}", b"{" * 10000, b"\x00" * 100)))}
    return {name: dump(draw(spoiled(parse(data), keys, most))).encode()}


SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads", "max_position_embeddings", "model_type", "architectures", "tie_word_embeddings")
SIZES += ("pad_token_id", "hidden_act", "rope_parameters", "rms_norm_eps", "dtype", "attention_bias", "mlp_bias")
OTHERS = ("auto_map", "quantization_config", "text_config", "attn_implementation", "torch_dtype", "layer_types")
OTHERS += ("num_local_experts", "num_experts", "n_routed_experts", "modular", "dense_config", "is_encoder_decoder")


@st.composite
def configs(draw: st.DrawFn, data: bytes, keys: tuple[str, ...] = SIZES) -> Files:
    """Return a config.json with wrong types, sizes, keys that others read, or code that it names."""
    tree = parse(data)
    if draw(st.booleans()):
        values = (
            *HOSTILE,
            Pairs([["AutoConfig", "evil.Config"], ["AutoModelForCausalLM", "evil.Model"], ["AutoTokenizer", "evil.T"]]),
            Pairs([["quant_method", "bitsandbytes"], ["load_in_4bit", True]]),
            Pairs([["quant_method", "gptq"], ["bits", 4]]),
        )
        tree.append([draw(st.sampled_from(OTHERS)), draw(st.sampled_from(values))])
        return {"config.json": dump(tree).encode()}
    if draw(st.booleans()):
        # one size alone, so that the rest of the way is gone too
        sizes = [pair for pair in tree if isinstance(pair[1], int) and not isinstance(pair[1], bool)]
        chosen = draw(st.sampled_from(sizes))
        numbers = (
            0,
            -1,
            1,
            chosen[1] + 1,
            chosen[1] * 2,
            10**6,
            2**31,
            2**40,
            2**62,
            2**63,
            10**30,
            "8",
            8.5,
            None,
            True,
        )
        chosen[1] = draw(st.sampled_from(numbers))
        return {"config.json": dump(tree).encode()}
    return draw(documents(data, "config.json", keys))
