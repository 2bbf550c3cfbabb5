"""Graphs: traced from diffusers' modules without weights, composed, lowered for a target, bound to the weights file.

A traced graph is neutral: each Linear is one `fluxc::Linear(x, weight)` node and every weight is a named input. Lowering
replaces the Linear nodes by the form a target needs for the layer's format; binding turns weight inputs into external
initializers at their byte offset in the component's weights file.
"""

LINEAR_DOMAIN = "fluxc"
OPSET = 23
