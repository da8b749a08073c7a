"""How long it takes: attention, encoding and whole decoding steps, packed against what torch has, in one process."""

from occamkv.bench.attend import bench_attend
from occamkv.bench.decode import bench_decode
from occamkv.bench.encode import bench_encode
from occamkv.bench.inputs import Setting, Shape

__all__ = ["Setting", "Shape", "bench_attend", "bench_decode", "bench_encode"]
