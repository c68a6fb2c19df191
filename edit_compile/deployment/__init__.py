"""Files that draw with a converted model where this package is not: AOTInductor packages, ONNX, ExecuTorch."""
