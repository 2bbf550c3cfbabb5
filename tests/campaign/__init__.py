"""The reliability campaign: damaged inputs, kills, lack of resources, threads. `python -m campaign --help`, or `make campaign`.

Every case ends with an image (or the plan that was asked for) or with one error of fluxc's or fluxrt's own family. Cases follow
from a seed, which is printed; `--only KIND/NUMBER` repeats one of them.
"""
