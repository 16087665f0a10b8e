"""The mesh of local devices."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.devices import local_mesh
from mesh.layout import parse
from tests.tiny import cpu_devices


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_sees_a_variable_as_it_was_before_the_update(size: int) -> None:
    """Even what happens to run after the update: back-propagation does, where another thread is slow."""
    devices, dim = cpu_devices(size), mtf.Dimension("rows", 4)
    with tf.Graph().as_default():
        graph = mtf.Graph()
        mesh, mesh_impl = local_mesh(graph, parse(f"x:{size}", "rows:x", size), devices)
        variable = mtf.get_variable(mesh, "w", mtf.Shape([dim]), initializer=tf.ones_initializer())
        update = mtf.assign(variable, variable * 5.0)
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=False)
        slices = lowering.tensors[variable].to_laid_out_tensor().tensor_list
        with tf.control_dependencies([lowering.lowered_operation(update)]):
            late = [slice_ * 2 for slice_ in slices]
        with tf.Session(config=devices.session_config()) as session:
            session.run(tf.global_variables_initializer())
            session.run(lowering.copy_masters_to_slices())
            first, second = session.run(late), session.run(late)
    np.testing.assert_array_equal(np.concatenate(first), np.full(4, 2.0))
    np.testing.assert_array_equal(np.concatenate(second), np.full(4, 10.0))
