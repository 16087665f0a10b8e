"""The only room that knows Mesh-TensorFlow's internals.

Mesh-TensorFlow 0.1.21 registers its tensors through a function that TensorFlow 2.13 moved; it is put back
where the library looks for it before the library is imported, so import `mtf` from here and nowhere else.
"""

from tensorflow.python.framework import ops as _ops
from tensorflow.python.framework import tensor_conversion_registry as _registry

if not hasattr(_ops, "register_tensor_conversion_function"):
    _ops.register_tensor_conversion_function = _registry.register_tensor_conversion_function

import mesh_tensorflow as mtf

__all__ = ["mtf"]
