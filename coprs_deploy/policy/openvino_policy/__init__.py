"""Policy as OpenVINO graphs, without torch and transformers."""
