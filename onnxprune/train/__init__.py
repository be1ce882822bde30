"""Training the weights of an ONNX file: the protocol of trainers, and what drives them."""
