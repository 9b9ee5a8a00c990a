"""Put quantisation around the planned products: int8 or e4m3 operands, whose product a runtime computes as such."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import is_tap
from hstu_compile.errors import InternalError
from hstu_compile.op_schema import is_norm, node_attributes, norm_contract
from hstu_compile.quantized import Array, QuantizationPlan, QuantizedWeight, SiteScales
from hstu_compile.rewrite._last_layer import GraphValues
from hstu_compile.rewrite._pass import Pass, PassResult
from hstu_compile.rewrite.prune_last_layer import COLUMN_PARTS

_STANDARD = ("", "ai.onnx")
_MODEL = "model."  # in front of a parameter's name in an exported graph
_SWISH = 2  # of the norm operator's attribute activation
_CODE_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


class QuantizeProducts(Pass):
    """MatMul(x, W) of a planned product becomes Mul(MatMul(DQ(Q(x)), DQ(codes)), factors of the columns).

    Explicit and symmetric, as TensorRT takes it: a scale for the activation, one for the weight, zero points of zero,
    given although they could be left out, because TensorRT 8 wants three inputs. Scales are float16, like what they
    scale. The weight is stored as codes.

    The codes are those of a scale for each column, w[k, n] / s[n] rounded, as the reference defines them. Only the
    place where s[n] is applied is another: DequantizeLinear takes a power of two c for the whole matrix, and behind the
    product column n is multiplied with s[n] / c. Why: of DequantizeLinear with a scale for each column, in float16,
    TensorRT-RTX 1.6.1 makes a product that writes its sums of codes in float16, and multiplies with the scales then. On
    an H100 such sums were right up to 65,405 and infinite from 65,532 on in int8, right up to 65,408 and infinite from
    65,856 on in e4m3. One scale for the matrix goes into the product, in float32: with it sums up to 24,774,144 (int8)
    and 308,281,344 (e4m3) were right, in the same time.

    What it adds to the error: the scaled sum is rounded to float16 once more, before the factor: 2**-11 of the result
    at most, and where that sum is subnormal 2**-25 times the factor. The factors add nothing: c is the largest power of
    two that is not above the largest s[n], kept within 2**-14 and 1, so that s[n] / c and code * c are float16 numbers.
    The plan holds only products whose sums cannot leave float16, before or behind the factors
    (`QuantizedWeight.largest_sum`).

    A product's constant has the name of its parameter. Pruning splits it into columns, which keep the name in front of
    their suffix; a column's codes and scale depend on that column alone, so they are those of the whole. c may be
    another one.

    Smoothing divides the columns of x by powers of two, exactly, and multiplies the rows of W with them:
    1. x is the result of an HstuNorm whose scale and bias reach it linearly, and nothing but this product reads it:
       they are divided;
    2. the same of a LayerNormalization and the Cast behind it;
    3. otherwise a Mul stands in front of the QuantizeLinear.

    Runs after prune_last_layer and fuse_norms, which look for products of constants and for norms as exported.
    """

    name = "quantize_products"

    def __init__(self, plan: QuantizationPlan) -> None:
        self._plan = plan

    def call(self, model: onnx.ModelProto) -> PassResult:
        rewriting = _Rewriting(model.graph, self._plan)
        counts = rewriting.run()
        # A planned constant that anything else reads, or reads otherwise, would stay in float16 unnoticed.
        self.expect(PassResult(counts), "products", rewriting.wanted)
        return PassResult(counts)


def quantized_sites(model: onnx.ModelProto, plan: QuantizationPlan) -> set[str]:
    """Sites of a plan whose codes a graph holds."""
    known = {f"{name}/{plan.kind}": site for name, site in _constants(plan).items()}
    return {known[tensor.name] for tensor in model.graph.initializer if tensor.name in known}


def _constants(plan: QuantizationPlan) -> dict[str, str]:
    """Names that the constants of the planned products can have, and the site of each."""
    return {
        f"{_MODEL}{scales.weight_name}{part}": site
        for site, scales in plan.sites.items()
        for part in ("", *COLUMN_PARTS)
    }


class _Rewriting:
    """One run of the pass over one graph."""

    def __init__(self, graph: onnx.GraphProto, plan: QuantizationPlan) -> None:
        self.graph, self.plan = graph, plan
        self.values = GraphValues(graph)
        names = _constants(plan)
        self.sites = {tensor.name: names[tensor.name] for tensor in graph.initializer if tensor.name in names}
        self.wanted = sum(name in self.sites for node in graph.node for name in node.input)
        self.made: set[str] = set()
        self.counts = {"products": 0, "folded": 0, "scaled": 0}

    def run(self) -> dict[str, int]:
        """Rewrite the graph in place; counts of products, and of those whose smoothing was folded or multiplied."""
        products = {
            i: self.sites[node.input[1]]
            for i, node in enumerate(self.values.nodes)
            if node.op_type == "MatMul" and node.domain in _STANDARD and node.input[1] in self.sites
        }
        folds = self._folds(products)
        for norm, site in folds.items():
            self._divide_norm(self.values.nodes[norm], site)
        folded = {name for norm in folds for name in self._results(norm)}
        nodes: list[onnx.NodeProto] = []
        for i, node in enumerate(self.values.nodes):
            if i in products:
                nodes += self._quantized(node, products[i], is_smooth=node.input[0] in folded)
            else:
                nodes.append(node)
        if products:
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del self.graph.node[:]
            self.graph.node.extend(copies)
            self._drop_unread()
        return self.counts

    def _folds(self, products: dict[int, str]) -> dict[int, str]:
        """Place of each norm that can take the smoothing of a site in, and the site."""
        found = {}
        for i, site in products.items():
            if self.plan.sites[site].smoothing is None:
                continue
            norm = self._linear_norm(self.values.nodes[i].input[0])
            if norm is None:
                continue
            results = self._results(norm)
            readers = {reader for name in results for reader in self.values.consumers.get(name, [])}
            inside = {self.values.producer[name] for name in results}
            shown = any(name in self.values.outputs or is_tap(name) for name in results)
            if not shown and all(products.get(reader) == site for reader in readers - inside):
                found[norm] = site
        return found

    def _linear_norm(self, name: str) -> int | None:
        """Place of the norm whose scale and bias reach a value linearly: cases 1 and 2."""
        place = self.values.producer.get(name)
        if place is None:
            return None
        node = self.values.nodes[place]
        if is_norm(node):
            attributes = node_attributes(node)
            return place if attributes["activation"] != _SWISH and not attributes["concat"] else None
        if node.op_type != "Cast":
            return None
        place = self.values.producer.get(node.input[0])
        is_layer_norm = place is not None and self.values.nodes[place].op_type == "LayerNormalization"
        return place if is_layer_norm else None

    def _results(self, norm: int) -> list[str]:
        """A norm's result, and of a LayerNormalization the Casts of it."""
        result = self.values.nodes[norm].output[0]
        readers = [self.values.nodes[i] for i in self.values.consumers.get(result, [])]
        return [result, *(node.output[0] for node in readers if node.op_type == "Cast")]

    def _divide_norm(self, node: onnx.NodeProto, site: str) -> None:
        """Divide a norm's scale and bias by the site's smoothing."""
        scales = self.plan.sites[site]
        smoothing = scales.smoothing
        assert smoothing is not None
        if is_norm(node):
            names = [each.name for each in norm_contract().present_inputs(node_attributes(node))]
            places = [names.index(name) for name in ("scale", "bias") if name in names]
        else:
            places = [place for place in (1, 2) if place < len(node.input) and node.input[place]]
        for place in places:
            array = self.values.constant(node.input[place])
            if array is None or array.shape != smoothing.shape:
                raise InternalError(f"{node.input[place]} of {node.name} is no constant row of {smoothing.shape}")
            divided = (array / smoothing).astype(array.dtype)
            # Norms without parameters share one row of ones: each site divides a copy of its own.
            name = f"{node.input[place]}/{scales.weight_name}"
            node.input[place] = self._initializer(name, numpy_helper.from_array(divided))
        self.counts["folded"] += 1

    def _quantized(self, node: onnx.NodeProto, site: str, *, is_smooth: bool) -> list[onnx.NodeProto]:
        """What stands in the place of a product."""
        scales, weight_name = self.plan.sites[site], node.input[1]
        rows, prefix = node.input[0], node.name or node.output[0]
        known = self.values.types.get(rows)
        half = known.elem_type if known is not None else TensorProto.UNDEFINED
        if known is None or half != TensorProto.FLOAT16:
            raise InternalError(f"{prefix} multiplies {TensorProto.DataType.Name(half)}; quantised graphs are float16")
        dims = known.shape.dim
        nodes = []
        if scales.smoothing is not None and not is_smooth:
            factors = numpy_helper.from_array((1 / scales.smoothing).astype(np.float16))
            inverse = self._initializer(f"{_MODEL}{scales.weight_name}/inverse_smoothing", factors)
            smoothed = f"{prefix}/smoothed"
            nodes.append(helper.make_node("Mul", [rows, inverse], [smoothed], name=smoothed))
            self._describe(smoothed, half, dims)
            self.counts["scaled"] += 1
            rows = smoothed
        code_type = _CODE_TYPES[self.plan.kind]
        scale = self._initializer(
            f"{_MODEL}{scales.weight_name}/input_scale",
            numpy_helper.from_array(np.array(scales.input_scale, np.float16)),
        )
        zero = self._zero(code_type)
        codes, activation = f"{prefix}/codes", f"{prefix}/activation"
        nodes += [
            helper.make_node("QuantizeLinear", [rows, scale, zero], [codes], name=codes),
            helper.make_node("DequantizeLinear", [codes, scale, zero], [activation], name=activation),
        ]
        self._describe(codes, code_type, dims)
        self._describe(activation, half, dims)
        weight, columns, more = self._weight(weight_name, scales)
        product, operands = f"{prefix}/product", [activation, weight]
        self._describe(product, half, [*dims[:-1], self.values.initializers[weight_name].dims[1]])
        self.counts["products"] += 1
        return [
            *nodes,
            *more,
            helper.make_node("MatMul", operands, [product], name=node.name),
            helper.make_node("Mul", [product, columns], node.output, name=f"{prefix}/columns"),
        ]

    def _weight(self, name: str, scales: SiteScales) -> tuple[str, str, list[onnx.NodeProto]]:
        """The dequantised weight, the factors of its columns, and the node that makes the former unless made before."""
        result, factors = f"{name}/dequantized", f"{name}/column_factors"
        if result in self.made:
            return result, factors, []
        self.made.add(result)
        matrix = self.values.constant(name)
        assert matrix is not None
        quantized = scales.weight(matrix, self.plan.kind)
        code_type = _CODE_TYPES[self.plan.kind]
        inputs = [
            self._initializer(f"{name}/{self.plan.kind}", _codes(quantized, code_type)),
            self._initializer(f"{name}/scale", numpy_helper.from_array(np.array(quantized.common_scale(), np.float16))),
            self._zero(code_type),
        ]
        self._initializer(factors, numpy_helper.from_array(quantized.column_factors()))
        self._describe(result, TensorProto.FLOAT16, matrix.shape)
        return result, factors, [helper.make_node("DequantizeLinear", inputs, [result], name=result)]

    def _zero(self, code_type: int) -> str:
        """The zero point of all."""
        return self._initializer(f"{self.plan.kind}_zero", helper.make_tensor("", code_type, (), bytes(1), raw=True))

    def _initializer(self, name: str, tensor: TensorProto) -> str:
        if name not in self.made:
            self.made.add(name)
            tensor.name = name
            self.graph.initializer.append(tensor)
        return name

    def _describe(self, name: str, kind: int, dims: Iterable[Any]) -> None:
        tensor = self.graph.value_info.add(name=name).type.tensor_type
        tensor.elem_type = kind
        tensor.shape.SetInParent()
        for dim in dims:
            made = tensor.shape.dim.add()
            if isinstance(dim, int):
                made.dim_value = dim
            else:
                made.CopyFrom(dim)

    def _drop_unread(self) -> None:
        """Remove constants whose place was taken."""
        read = {name for node in self.graph.node for name in node.input} | self.values.outputs
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)


def _codes(quantized: QuantizedWeight, code_type: int) -> TensorProto:
    """Codes as a tensor. NumPy has no e4m3, so its bytes are given."""
    codes: Array = np.ascontiguousarray(quantized.codes)
    return helper.make_tensor("", code_type, codes.shape, codes.tobytes(), raw=True)
