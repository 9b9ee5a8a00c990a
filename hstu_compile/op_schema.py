"""The contracts of hstu::HstuAttention and hstu::HstuNorm in Python, read from their PluginConfig.yaml. Level 1."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

import onnx
import onnx.defs
import yaml

from hstu_compile.errors import InternalError

CONTRACT_FILE = "hstuAttentionPlugin/HstuAttention_PluginConfig.yaml"
NORM_CONTRACT_FILE = "hstuNormPlugin/HstuNorm_PluginConfig.yaml"

_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


@dataclasses.dataclass(frozen=True)
class OpInput:
    """One input: `present_when` names the attribute that says whether the node has it, or is None."""

    name: str
    type: str
    dims: tuple[str, ...]
    present_when: str | None
    doc: str


@dataclasses.dataclass(frozen=True)
class OpOutput:
    """The one output."""

    name: str
    type: str
    doc: str


@dataclasses.dataclass(frozen=True)
class OpAttribute:
    """One attribute with its legal range; None means unbounded on that side.

    `default` is what a node without the attribute means; None: every node must have it.
    """

    name: str
    type: str
    min: float | None
    max: float | None
    min_exclusive: float | None
    default: float | None
    doc: str

    def problem(self, value: Any) -> str | None:
        """Why `value` is not legal, or None."""
        if self.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
            return f"{self.name} is {value!r}; it must be an integer"
        if self.type == "float" and not isinstance(value, (int, float)):
            return f"{self.name} is {value!r}; it must be a number"
        if value != value or value in (float("inf"), float("-inf")):
            return f"{self.name} is {value}; it must be finite"
        if self.min is not None and value < self.min:
            return f"{self.name} is {value}; the minimum is {self.min}"
        if self.max is not None and value > self.max:
            return f"{self.name} is {value}; the maximum is {self.max}"
        if self.min_exclusive is not None and value <= self.min_exclusive:
            return f"{self.name} is {value}; it must be greater than {self.min_exclusive}"
        return None


@dataclasses.dataclass(frozen=True)
class OpContract:
    """The operator: identity, inputs in order, output, attributes."""

    name: str
    namespace: str
    version: str
    types: dict[str, tuple[str, ...]]
    inputs: tuple[OpInput, ...]
    output: OpOutput
    attributes: tuple[OpAttribute, ...]

    def present_inputs(self, attributes: Mapping[str, Any]) -> tuple[OpInput, ...]:
        """Inputs of a node with these attributes, in order; an attribute that is not given has its default."""
        given = {**self.defaults(), **attributes}
        return tuple(i for i in self.inputs if i.present_when is None or given[i.present_when] == 1)

    def defaults(self) -> dict[str, float]:
        """What the attributes that a node may lack mean then."""
        return {each.name: each.default for each in self.attributes if each.default is not None}

    def problems(self, attributes: Mapping[str, Any]) -> list[str]:
        """Everything that is wrong with a node's attributes."""
        known = {attribute.name: attribute for attribute in self.attributes}
        missing = [f"{name} is missing" for name, a in known.items() if name not in attributes and a.default is None]
        illegal = [p for name, a in known.items() if name in attributes and (p := a.problem(attributes[name]))]
        return missing + illegal

    def onnx_types(self, name: str) -> list[str]:
        """ONNX spellings of a type or type variable."""
        return [_ONNX_TYPES[each] for each in self.types.get(name, (name,))]


def attention_contract() -> OpContract:
    """The contract of HstuAttention."""
    return _contract_in(CONTRACT_FILE)


def norm_contract() -> OpContract:
    """The contract of HstuNorm."""
    return _contract_in(NORM_CONTRACT_FILE)


def contract_of(operator: str) -> OpContract:
    """The contract of an operator by its name. Raises KeyError for a name that is none of ours."""
    return {contract.name: contract for contract in (attention_contract(), norm_contract())}[operator]


def strided_inputs(operator: str) -> tuple[str, ...]:
    """The inputs whose rows a kernel of this operator may read as columns of a wider tensor."""
    return {attention_contract().name: ("q", "k", "v"), norm_contract().name: ("x", "gate")}[operator]


@functools.cache
def _contract_in(file: str) -> OpContract:
    """Parse a contract file that ships with the plugins' sources."""
    text = (importlib.resources.files("hstu_compile.plugins") / file).read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    return OpContract(
        name=raw["name"],
        namespace=raw["namespace"],
        version=raw["version"],
        types={name: tuple(members) for name, members in raw["types"].items()},
        inputs=tuple(
            OpInput(i["name"], i["type"], tuple(map(str, i["dims"])), i.get("present_when"), i["doc"])
            for i in raw["inputs"]
        ),
        output=OpOutput(*(raw["outputs"][0][key] for key in ("name", "type", "doc"))),
        attributes=tuple(
            OpAttribute(
                a["name"], a["type"], a.get("min"), a.get("max"), a.get("min_exclusive"), a.get("default"), a["doc"]
            )
            for a in raw["attributes"]
        ),
    )


def is_attention(node: onnx.NodeProto) -> bool:
    """Whether a node is an hstu::HstuAttention."""
    contract = attention_contract()
    return node.domain == contract.namespace and node.op_type == contract.name


def is_norm(node: onnx.NodeProto) -> bool:
    """Whether a node is an hstu::HstuNorm."""
    contract = norm_contract()
    return node.domain == contract.namespace and node.op_type == contract.name


def node_attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The contract's attributes of a node of either operator as Python values, defaults included.

    Raises:
        InternalError: if one is missing or outside its range.
    """
    contract = norm_contract() if is_norm(node) else attention_contract()
    names = {attribute.name for attribute in contract.attributes}
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in names}
    if problems := contract.problems(values):
        raise InternalError(f"node {node.name} breaks the contract of {contract.name}: {'; '.join(problems)}")
    return contract.defaults() | values


@functools.cache
def register_onnx_schema() -> None:
    """Tell onnx about the operators in this process, which export and the model checker need."""
    for contract in (attention_contract(), norm_contract()):
        onnx.defs.register_schema(_schema_of(contract))


def _schema_of(contract: OpContract) -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    # One variadic input, because which inputs a node has depends on its attributes: `present_inputs` is the rule.
    inputs = [
        parameter(
            "inputs",
            "X",
            "the contract's inputs in order, without those whose presence attribute is not 1",
            param_option=onnx.defs.OpSchema.FormalParameterOption.Variadic,
            is_homogeneous=False,
            min_arity=sum(i.present_when is None for i in contract.inputs),
        )
    ]
    attr_type = onnx.defs.OpSchema.AttrType
    kinds = {"int": attr_type.INT, "float": attr_type.FLOAT}
    attributes = [
        onnx.defs.OpSchema.Attribute(a.name, kinds[a.type], a.doc, required=True)
        if a.default is None
        else onnx.defs.OpSchema.Attribute(a.name, onnx.helper.make_attribute(a.name, a.default), a.doc)
        for a in contract.attributes
    ]
    for name in ("plugin_version", "plugin_namespace"):
        attributes.append(
            onnx.defs.OpSchema.Attribute(name, attr_type.STRING, "looked up in TensorRT's registry", required=True)
        )
    return onnx.defs.OpSchema(
        contract.name,
        contract.namespace,
        int(contract.version),
        inputs=inputs,
        outputs=[parameter(contract.output.name, contract.output.type, contract.output.doc)],
        type_constraints=[
            (contract.output.type, contract.onnx_types(contract.output.type), contract.output.doc),
            ("X", sorted(set(_ONNX_TYPES.values())), "any type of the contract"),
        ],
        attributes=attributes,
    )
