"""The model in Mesh-TensorFlow: pure functions of a Context and named tensors."""
