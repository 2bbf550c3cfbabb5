"""The `openvino` target: graphs in standard operators for OpenVINO, audited as its CPU plugin executes them."""
