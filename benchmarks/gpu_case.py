"""One attention call on a GPU, and nothing else, for tools that watch it: compute-sanitizer, ncu.

`python benchmarks/gpu_case.py --head-dim 128 --context 32768 --batch 8`
"""

import argparse

import torch

from occamkv.bench import Shape
from occamkv.bench.scene import packed_scene
from occamkv.kernels import backend_for
from occamkv.methods import method


def main() -> None:
    """Run the call, and a whole step where the backend has a call for that."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("head-dim", 128), ("context", 700), ("batch", 2), ("kv-heads", 2), ("group", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", default="oscar")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    shape = Shape("case", given.group * given.kv_heads, given.kv_heads, given.head_dim)
    form, device = method(given.method), torch.device(given.device)
    backend = backend_for(form.packed_format, device, given.head_dim)
    scene = packed_scene(shape, form, backend, context=given.context, batch=given.batch, device=device, room=1)
    found = [scene.attend(scene.q), scene.step()]
    print(backend.name, [float(out.float().norm()) for out in found])


if __name__ == "__main__":
    main()
