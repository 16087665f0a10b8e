"""bfloat16: what is calculated in float32 all the same, and every option close to its float32 numbers."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from config import ModelConfig
from mesh import mtf
from mesh.cross_entropy import head_cross_entropy
from mesh.devices import local_mesh
from mesh.elementwise import elementwise
from mesh.experts import with_expert_rules
from mesh.layout import parse
from mesh.operations import cache_update, cast_variable, embedding_lookup
from mesh.randomness import dropout, make_key
from models import gpt
from models.context import Context, variable_dtype
from models.dims import make_dims
from tests.test_options import OPTIONS, option_config
from tests.tiny import MtfSession, cpu_devices, random_tokens, tiny_config
from tests.training_steps import train_step, without_rewriting
from tests.workspace import Workspace

BF16 = tf.bfloat16
HALF_ULP = 2.0**-8  # what rounding to eight binary digits changes at most, relative to the number


def rounded(array: np.ndarray) -> np.ndarray:
    """The bfloat16 numbers nearest to those of `array`, as float32."""
    return array.astype(BF16.as_numpy_dtype).astype(np.float32)


TOKENS, VOCAB, EMBD = mtf.Dimension("batch", 1024), mtf.Dimension("vocab", 6), mtf.Dimension("embd", 8)
MESHES = [("x:1", ""), ("x:2,y:2", "batch:x,vocab:y")]


@pytest.mark.parametrize(("mesh_shape", "layout"), MESHES)
def test_losses_and_sums_of_bfloat16_are_float32(mesh_shape: str, layout: str) -> None:
    random = np.random.default_rng(0)
    hidden, table = (rounded(random.normal(size=[size, EMBD.size])) for size in (TOKENS.size, VOCAB.size))
    labels = np.full(TOKENS.size, 2, np.int32)  # the same again and again: a bfloat16 sum would stop at 256 of them
    labels[::4] = 5

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        hidden_, table_ = (
            mtf.cast(mtf.import_tf_tensor(mesh, x, mtf.Shape([dim, EMBD])), BF16)
            for x, dim in ((hidden, TOKENS), (table, VOCAB))
        )
        labels_ = mtf.import_tf_tensor(mesh, labels, mtf.Shape([TOKENS]))
        cross_entropy, log_z = head_cross_entropy(hidden_, table_, labels_)
        d_hidden, d_table = mtf.gradients([mtf.reduce_sum(cross_entropy)], [hidden_, table_])
        looked_up = mtf.reduce_sum(mtf.cast(embedding_lookup(table_, labels_), tf.float32))
        d_lookup = mtf.gradients([looked_up], [table_])[0]
        found = {"cross_entropy": cross_entropy, "log_z": log_z, "d_hidden": d_hidden, "d_table": d_table}
        return {name: mtf.cast(x, tf.float32) for name, x in (found | {"d_lookup": d_lookup}).items()}

    got = MtfSession(mesh_shape, layout).run(build)
    logits = hidden.astype(np.float64) @ table.T
    log_z = np.log(np.exp(logits).sum(-1))
    one_hot = np.eye(VOCAB.size)[labels]
    d_logits = np.exp(logits - log_z[:, None]) - one_hot
    np.testing.assert_allclose(got["log_z"], log_z, atol=1e-5)
    np.testing.assert_allclose(got["cross_entropy"], log_z - (logits * one_hot).sum(-1), atol=1e-5)
    np.testing.assert_allclose(got["d_hidden"], d_logits @ table, atol=4 * HALF_ULP * np.abs(table).max())
    expected = d_logits.T @ hidden
    np.testing.assert_allclose(got["d_table"], expected, atol=2 * HALF_ULP * np.abs(expected).max())
    np.testing.assert_array_equal(got["d_lookup"], np.tile(np.bincount(labels, minlength=6)[:, None], EMBD.size))


@pytest.mark.parametrize(("mesh_shape", "layout"), [("x:1", ""), ("x:2", "batch:x")])
def test_gradients_of_many_microbatches_are_added_in_float32(mesh_shape: str, layout: str) -> None:
    batch = mtf.Dimension("batch", 1024)

    def build(mesh: mtf.Mesh) -> list[mtf.Tensor]:
        ones = mtf.import_tf_tensor(mesh, np.ones(batch.size, np.float32), mtf.Shape([batch]))

        def microbatch(features: dict[str, mtf.Tensor]) -> dict[str, mtf.Tensor]:
            slices = mtf.VariableDType(tf.float32)
            w = mtf.get_variable(mesh, "w", mtf.Shape([]), dtype=slices, initializer=tf.zeros_initializer())
            product = mtf.cast(features["ones"], BF16) * cast_variable(w, BF16)
            return {"loss": mtf.cast(mtf.reduce_sum(product), tf.float32)}

        gradients, _ = mtf.serialize_training_step({"ones": ones}, microbatch, batch, 512)
        assert gradients[0].dtype == tf.float32
        return gradients

    assert MtfSession(mesh_shape, layout).run(build) == [1024.0]


def test_values_are_rounded_once() -> None:
    random = np.random.default_rng(0)
    x = rounded(random.normal(size=[4096]))
    entries, memory = mtf.Dimension("entries", x.size), mtf.Dimension("memory_length", 3)

    def build(mesh: mtf.Mesh) -> dict[str, mtf.Tensor]:
        x_ = mtf.cast(mtf.import_tf_tensor(mesh, x, mtf.Shape([entries])), BF16)
        cache = mtf.zeros(mesh, mtf.Shape([memory, entries]), BF16)
        found = {
            "swish": elementwise(tf.nn.swish, x_, "swish"),
            "kept": dropout(x_, make_key(mesh, 0, 0), 0.1, "here"),
            "cache": cache_update(cache, x_, mtf.constant(mesh, 1, dtype=tf.int32)),
        }
        return {name: mtf.cast(value, tf.float32) for name, value in found.items()}

    got = MtfSession().run(build)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got["swish"], wide / (1 + np.exp(-wide)), rtol=1.01 * HALF_ULP, atol=1e-6)
    kept = got["kept"] != 0
    assert 0.08 < 1 - kept.mean() < 0.12
    np.testing.assert_array_equal(got["kept"][kept], rounded(x[kept] / np.float32(0.9)))
    np.testing.assert_array_equal(got["cache"], [0 * x, x, 0 * x])


def covering() -> list[str]:
    """Names of OPTIONS, few, whose configs hold every key and attention type of the others."""

    def holds(name: str) -> set[str]:
        config = OPTIONS[name]
        return {*config, *itertools.chain.from_iterable(names for names, _ in config["attention_types"])}

    missing = set.union(*map(holds, OPTIONS)) - {"scale_by_in", "scale_by_depth"}  # which set initial values alone
    names = []
    while missing:
        names.append(max(OPTIONS, key=lambda name: len(holds(name) & missing)))
        missing -= holds(names[-1])
    return names


ROWS, LENGTH = 4, 7


def build_step(config: ModelConfig, mesh: mtf.Mesh, tokens: np.ndarray) -> tuple[dict[str, mtf.Tensor], list]:
    """What a bfloat16 training step finds, and float32 beside it on the same variables; and its updates."""
    dims = make_dims(config, ROWS, LENGTH)
    shape = mtf.Shape([dims.batch, dims.sequence])
    inputs, labels = (mtf.import_tf_tensor(mesh, rows, shape) for rows in (tokens[:, :-1], tokens[:, 1:]))
    at, token = mtf.constant(mesh, 4, dtype=tf.int32), tokens[:, 4]
    found = {}
    for precision in ("float32", "bfloat16"):
        dtype = variable_dtype(config.model_copy(update={"precision": precision}), is_training=True)
        whole = Context(config, mesh, dims, dtype, keep_states_until=at)
        found[f"{precision} logits"] = gpt.logits(whole, inputs)
    if whole.causal:
        one = Context(config, mesh, dims, dtype, position=at, states=dict(whole.states))
        found["bfloat16 decoded"] = gpt.logits(one, mtf.import_tf_tensor(mesh, token, mtf.Shape([dims.batch])))
    losses = gpt.losses(Context(config, mesh, dims, dtype, dropout_key=make_key(mesh, 0, 0)), inputs, labels)
    found["cross_entropy"], found["loss"] = mtf.reduce_mean(losses.cross_entropy), mtf.reduce_mean(losses.objective)
    if losses.auxiliary is not None:
        found["loss"] += losses.auxiliary
    variables = mesh.graph.trainable_variables
    gradients = mtf.gradients([found["loss"]], [variable.outputs[0] for variable in variables])
    assert {gradient.dtype for gradient in gradients} == {tf.float32}
    found = {key: mtf.anonymize(value) for key, value in found.items()}  # so that they arrive whole
    return found, [mtf.assign_sub(v, config.lr * gradient) for v, gradient in zip(variables, gradients, strict=True)]


ONE = ("x:1", "")
MESHES_OF_OPTIONS = [ONE, ONE, ("x:2,y:2", "batch:x,embd:y"), ONE, ("x:2,y:2", "batch:x,heads:y,vocab:y")]


def three_steps(config: ModelConfig, tokens: np.ndarray, mesh_shape: str, layout: str) -> list[dict[str, np.ndarray]]:
    """What build_step finds before each of three updates."""
    session = MtfSession(mesh_shape, layout)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, with_expert_rules(session.layout), session.devices)
        found, updates = build_step(config, mesh, tokens)
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        fetches = {key: lowering.export_to_tf_tensor(value) for key, value in found.items()}
        to_slices = lowering.copy_masters_to_slices()
        operations = [lowering.lowered_operation(update) for update in updates]
        with tf.Session(config=without_rewriting(session.devices.session_config())) as tf_session:
            tf_session.run(tf.global_variables_initializer())
            tf_session.run(to_slices)
            steps = []
            for _ in range(3):
                steps.append(tf_session.run(fetches))
                tf_session.run(operations)
    return steps


@pytest.mark.parametrize(("name", "mesh"), zip(covering(), itertools.cycle(MESHES_OF_OPTIONS)))
def test_option_trains_and_decodes_in_bfloat16(tmp_path: Path, name: str, mesh: tuple[str, str]) -> None:
    config = option_config(tmp_path, name).model_copy(update={"lr": 0.1})
    tokens = random_tokens(ROWS, LENGTH + 1, vocab=config.n_vocab)
    steps = three_steps(config, tokens, *mesh)
    for got in steps:
        wide = got["float32 logits"].astype(np.float64)
        log_z = np.log(np.exp(wide).sum(-1))
        targets = np.take_along_axis(wide, tokens[:, 1:, None], axis=-1)[..., 0]
        assert got["cross_entropy"] == pytest.approx((log_z - targets).mean(), rel=0.02)
        spread = np.abs(wide).max()
        assert spread > 1e-3
        np.testing.assert_allclose(got["bfloat16 logits"], wide, atol=0.04 * spread)
        if "bfloat16 decoded" in got:
            np.testing.assert_allclose(got["bfloat16 decoded"], wide[:, 4], atol=0.04 * spread)
    assert steps[2]["loss"] < steps[1]["loss"] < steps[0]["loss"]

    if mesh == ONE:
        return
    for several, one in zip(steps, three_steps(config, tokens, *ONE), strict=True):
        # Partial sums are rounded on every device, so the two differ as bfloat16 differs from float32 on either: the
        # logits by the bound above; the loss, a mean in which that averages out, by what rounds the largest logit.
        spread = np.abs(one["float32 logits"]).max()
        np.testing.assert_allclose(several["bfloat16 logits"], one["bfloat16 logits"], atol=0.04 * spread)
        np.testing.assert_allclose(several["bfloat16 decoded"], one["bfloat16 decoded"], atol=0.04 * spread)
        assert several["loss"] == pytest.approx(one["loss"], rel=0, abs=HALF_ULP * spread)


def test_on_four_devices_variables_are_float32_and_activations_bfloat16(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, precision="bfloat16", embed_dropout=0.1, attn_dropout=0.1, **ONE_LAYER)
    layout = parse("x:2,y:2", "batch:x,heads:y,intermediate_expanded:y,vocab:y", 4)
    with tf.Graph().as_default() as tf_graph:
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, layout, cpu_devices(4))
        train_step(config)(mesh)
        mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        masters = {variable.op.name: variable.dtype for variable in tf.global_variables()}
        handles = [operation for operation in tf_graph.get_operations() if operation.type == "VarHandleOp"]
    variables = {handle.name: handle.get_attr("dtype") for handle in handles}
    weights = {name for name in masters if not name.endswith(("/adam_m", "/adam_v"))}
    assert masters.keys() == {f"{name}{slot}" for name in weights for slot in ("", "/adam_m", "/adam_v")}
    slices = {f"{name}_slice_{device}" for name in masters for device in range(4)}
    assert variables == dict.fromkeys(masters.keys() | slices, tf.float32)

    found: dict[str, set[tf.DType]] = {}
    for operation in graph.operations:
        for tensor in operation.outputs:
            found.setdefault(" ".join(tensor.shape.dimension_names), set()).add(tensor.dtype)
    # with their gradients: what both dense layers and attention give, and what the loss keeps of the logits
    products = ["batch sequence intermediate_expanded", "batch sequence heads", "batch sequence vocab"]
    assert [found[dims] for dims in products] == [{tf.bfloat16}] * 3
    softmax = {op.outputs[0].dtype for op in graph.operations if "masked_softmax" in op.name}
    assert softmax == {tf.float32}


ONE_LAYER = {"n_layer": 1, "attention_types": [[["global"], 1]]}


def test_thirty_steps_have_the_losses_of_float32(tmp_path: Path) -> None:
    runs = {}
    for precision in ("float32", "bfloat16"):
        (tmp_path / precision).mkdir()
        runs[precision] = Workspace(tmp_path / precision, precision=precision, train_steps=30, lr=0.003, **ONE_LAYER)
        assert runs[precision].main() == 0
    expected = runs["float32"].losses()
    assert expected[-1] < expected[0] - 0.05
    np.testing.assert_allclose(runs["bfloat16"].losses(), expected, rtol=0.02)
    assert runs["bfloat16"].losses() != expected
    weights = runs["bfloat16"].weights()
    assert {value.dtype for name, value in weights.items() if name != "global_step"} == {np.dtype(np.float32)}
    table = weights["gpt2/wte"]
    assert (table != rounded(table)).mean() > 0.9  # the masters are not rounded
