"""Writes an operator's contract as C++ tables, hstuAttentionContract.h or hstuNormContract.h, from its YAML.

CMake runs this at build time, so the field reader, the shape checker and the documentation cannot drift from the
YAML that the ONNX schema is read from. Needs only PyYAML.

Usage: python generate_contract.py CONTRACT.yaml OUTPUT.h
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

# The type classes of the contracts: T, S and O are resolved per node, the others are fixed.
TYPE_CLASSES = {"T": "kElement", "S": "kTimestamp", "O": "kOutput", "int32": "kInt32", "float32": "kFloat32"}
ELEMENT_TYPES = {
    "float32": "kFloat32",
    "float16": "kFloat16",
    "bfloat16": "kBfloat16",
    "int64": "kInt64",
    "int32": "kInt32",
}

_DIM = re.compile(r"^(?:(?P<factor>\d+)\*)?(?P<name>[A-Za-z][A-Za-z_]*?)(?P<addend>[+-]\d+)?$")


def camel(name: str) -> str:
    """Turns a snake_case name of the contract into the lowerCamel name of its C++ member.

    >>> camel("min_full_attn_seq_len")
    'minFullAttnSeqLen'
    """
    head, *tail = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in tail)


def pascal(name: str) -> str:
    """Turns a name of the contract into the part of a k-constant after the k.

    >>> pascal("pos_table_len"), pascal("Lq")
    ('PosTableLen', 'Lq')
    """
    word = camel(name)
    return word[:1].upper() + word[1:]


def parse_dim(text: str) -> tuple[str, int, int]:
    """Parses a dimension of the contract into (symbol, factor, addend): extent = factor * symbol + addend.

    Raises:
        ValueError: if the text is neither a symbol nor of the form ``factor*symbol+addend``.

    >>> parse_dim("Lq"), parse_dim("2*pos_table_len-1"), parse_dim("B_plus_1")
    (('Lq', 1, 0), ('pos_table_len', 2, -1), ('B', 1, 1))
    """
    if text.endswith("_plus_1"):
        return text[: -len("_plus_1")], 1, 1
    match = _DIM.match(text)
    if match is None:
        raise ValueError(f"dimension {text!r} of the contract is not of the form [factor*]symbol[+addend]")
    return match["name"], int(match["factor"] or 1), int(match["addend"] or 0)


def quoted(text: str) -> str:
    """Returns a C++ string literal of the text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _attribute_row(spec: dict[str, Any], struct: str) -> str:
    is_float = spec["type"] == "float"
    low = spec.get("min_exclusive", spec.get("min"))
    high = spec.get("max")
    member = f"&{struct}::{camel(spec['name'])}"
    fields = [
        quoted(spec["name"]),
        "true" if is_float else "false",
        "true" if "default" in spec else "false",
        "true" if "min_exclusive" in spec else "false",
        "-std::numeric_limits<double>::infinity()" if low is None else repr(float(low)),
        "std::numeric_limits<double>::infinity()" if high is None else repr(float(high)),
    ]
    members = [
        member if is_float else "nullptr",
        "nullptr" if is_float else member,
    ]
    return "    {{" + ", ".join(fields) + "}, " + ", ".join(members) + "},"


def _tensor_row(spec: dict[str, Any], struct: str) -> str:
    dims = [parse_dim(str(dim)) for dim in spec["dims"]]
    present = spec.get("present_when")
    cells = ", ".join(f"{{Symbol::k{pascal(name)}, {factor}, {addend}}}" for name, factor, addend in dims)
    member = f"&{struct}::{camel(present)}" if present else "nullptr"
    kind = TYPE_CLASSES[spec["type"]]
    return f"    {{{quoted(spec['name'])}, TypeClass::{kind}, {len(dims)}, {{{{{cells}}}}}, {member}}},"


def header_from_contract(contract: dict[str, Any]) -> str:
    """Renders the whole header.

    Args:
        contract: the parsed YAML: name, namespace, version, types, inputs, outputs, attributes, limits.

    Returns:
        The text of the header.

    Raises:
        KeyError: if the contract names a type this generator does not know.
        ValueError: if a dimension cannot be parsed, or an attribute with a default stands before one without.
    """
    symbols: list[str] = []
    for tensor in [*contract["inputs"], *contract["outputs"]]:
        for dim in tensor["dims"]:
            name = parse_dim(str(dim))[0]
            if name not in symbols:
                symbols.append(name)
    attributes = contract["attributes"]
    has_default = ["default" in spec for spec in attributes]
    if has_default != sorted(has_default):
        # What engines store of a node ends with them, so that older engines, which lack them, can be read.
        raise ValueError("an attribute without a default follows one that has one")
    max_rank = max(len(tensor["dims"]) for tensor in [*contract["inputs"], *contract["outputs"]])
    limits = contract["limits"]
    name, space = contract["name"], contract.get("cpp_namespace", contract["namespace"])
    struct = f"{name}Attributes"
    guard = f"{re.sub('(?<!^)(?=[A-Z])', '_', name).upper()}_CONTRACT_H"
    used = [spec["type"] for spec in [*contract["inputs"], *contract["outputs"]]]

    def types(key: str) -> str:
        return ", ".join(f"ElementType::{ELEMENT_TYPES[name]}" for name in contract["types"][key])

    lines = [
        f"// Generated from {name}_PluginConfig.yaml by generate_contract.py. Do not edit.",
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        "#include <array>",
        "#include <cstdint>",
        "#include <limits>",
        "",
        '#include "contractTables.h"',
        '#include "elementType.h"',
        "",
        f"namespace {space}",
        "{",
        "",
        f"inline constexpr char kPluginName[] = {quoted(contract['name'])};",
        f"inline constexpr char kPluginNamespace[] = {quoted(contract['namespace'])};",
        f"inline constexpr char kPluginVersion[] = {quoted(str(contract['version']))};",
        "inline constexpr OperatorIdentity kIdentity{kPluginNamespace, kPluginName, kPluginVersion};",
        "",
        "//! Attributes of one node, in the contract's order.",
        f"struct {struct}",
        "{",
    ]
    for spec in attributes:
        cpp = "float" if spec["type"] == "float" else "int32_t"
        default = spec.get("default", "")
        lines += [f"    {cpp} {camel(spec['name'])}{{{default}}}; //!< {spec['doc']}"]
    lines += [
        "};",
        "",
        f"using AttributeSpec = BasicAttributeSpec<{struct}>;",
        "",
        "inline constexpr AttributeSpec kAttributes[] = {",
        *[_attribute_row(spec, struct) for spec in attributes],
        "};",
        "",
        "//! Symbolic dimensions of the inputs and the output.",
        "enum class Symbol : int32_t",
        "{",
        *[f"    k{pascal(name)}," for name in symbols],
        "};",
        f"inline constexpr int32_t kNbSymbols = {len(symbols)};",
        "inline constexpr char const* kSymbolNames[] = {" + ", ".join(quoted(name) for name in symbols) + "};",
        "",
        "//! extent = factor * symbol + addend.",
        "struct DimSpec",
        "{",
        "    Symbol symbol;",
        "    int32_t factor;",
        "    int32_t addend;",
        "};",
        "",
        "//! How a tensor's element type is fixed.",
        "enum class TypeClass : int32_t",
        "{",
        *[f"    {kind}," for key, kind in TYPE_CLASSES.items() if key in used],
        "};",
        "",
        f"inline constexpr int32_t kMaxRank = {max_rank};",
        "",
        "//! What the contract says about one tensor. Null presentWhen: always present; else when that attribute is 1.",
        "struct TensorSpec",
        "{",
        "    char const* name;",
        "    TypeClass type;",
        "    int32_t rank;",
        "    std::array<DimSpec, kMaxRank> dims;",
        f"    int32_t {struct}::*presentWhen;",
        "};",
        "",
        "//! Index of each input in kInputs.",
        "enum class Input : int32_t",
        "{",
        *[f"    k{pascal(spec['name'])}," for spec in contract["inputs"]],
        "};",
        f"inline constexpr int32_t kNbInputs = {len(contract['inputs'])};",
        "",
        "inline constexpr TensorSpec kInputs[] = {",
        *[_tensor_row(spec, struct) for spec in contract["inputs"]],
        "};",
        "",
        "inline constexpr TensorSpec kOutputs[] = {",
        *[_tensor_row(spec, struct) for spec in contract["outputs"]],
        "};",
        f"inline constexpr int32_t kNbOutputs = {len(contract['outputs'])};",
        "",
        *[f"inline constexpr ElementType {TYPE_CLASSES[key]}Types[] = {{{types(key)}}};" for key in contract["types"]],
        "",
        *[
            f"inline constexpr int64_t k{side}{pascal(limit)} = {limits[limit][side.lower()]};"
            for limit in limits
            for side in ("Min", "Max")
        ],
        "",
        f"}} // namespace {space}",
        "",
        f"#endif // {guard}",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Writes the header named by the second argument from the contract named by the first."""
    if len(argv) != 3:
        sys.stderr.write(__doc__ or "")
        return 2
    contract = yaml.safe_load(Path(argv[1]).read_text(encoding="utf-8"))
    Path(argv[2]).write_text(header_from_contract(contract), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
