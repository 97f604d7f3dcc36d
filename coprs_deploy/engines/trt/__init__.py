"""TensorRT and TensorRT for RTX: building, caching, checking and running engines."""
