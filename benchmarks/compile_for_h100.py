"""Compiles the selective scan's CUDA kernels for an H100 that need not be present, and prints what each kernel takes.

    make cuda-compile

XLA's GPU compiler runs with a description of the device instead of the device. For every kernel in the PTX that it, or
Mosaic GPU, dumps, ptxas then reports the registers per thread (at most 255) and the bytes that are spilled. The
instructions for exponentials, ex2, are counted in the PTX: a loop's body counts once. If any bytes are spilled, the
script fails; reduce the sizes in `block_sizes` of the implementation.
"""

import argparse
import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

# d_inner of each preset, and the number of tokens of the latents for which the presets are made.
D_INNER = {"S": 768, "B": 1536, "L": 2048, "XL": 2304}
LENGTH, D_STATE = 1024, 16
IMPLEMENTATIONS = ("mosaic_gpu", "pallas_gpu")

# The description of an H100 PCIe that the compiler needs, a GpuTargetConfigProto in text form.
TARGET_CONFIG = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.755
  core_count: 114
  device_memory_size: 84942979072
  fpus_per_core: 128
  l2_cache_size: 52428800
  memory_bandwidth: 2039040000000
  shared_memory_per_block_optin: 232448
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  dnn_version: "9.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 PCIe"
"""


def main() -> None:
    """Compiles the kernels for every combination of the options and prints a row per kernel.

    Raises:
      SystemExit: always; with an error message if a kernel spills registers.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target-config", type=pathlib.Path, help="file with a GpuTargetConfigProto in text form (default: an H100)"
    )
    parser.add_argument("--presets", nargs="+", choices=D_INNER, default=list(D_INNER), help="sizes of the model")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--states", nargs="+", type=int, default=[D_STATE], help="states per channel")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes of the sequences")
    args = parser.parse_args()
    target_config = args.target_config.read_text() if args.target_config else TARGET_CONFIG
    with tempfile.TemporaryDirectory() as dump:
        # JAX reads both variables once, when it is imported.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
        # Mosaic GPU compiles its kernels itself.
        os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": dump}
        head = (
            "preset",
            "batch",
            "states",
            "dtype",
            "kernel",
            "registers",
            "spills",
            "ex2",
            "temporaries of the gradient",
        )
        print("{:6} {:>5} {:>6} {:8} {:33} {:>9} {:>6} {:>4}  {}".format(*head))
        spills = 0
        sizes = itertools.product(args.implementations, args.presets, args.batch, args.states, args.dtype)
        for implementation, preset, batch, d_state, dtype in sizes:
            megabytes = compile_gradient(
                target_config, batch, LENGTH, D_INNER[preset], d_state, dtype, implementation=implementation
            )
            for name, (registers, spilled, ex2) in sorted(register_usage(pathlib.Path(dump)).items()):
                row = f"{preset:6} {batch:5} {d_state:6} {dtype:8} {name:33} {registers:9} {spilled:6} {ex2:4}"
                print(f"{row} {megabytes:9.0f} MB", flush=True)
                spills += spilled
    sys.exit(f"the kernels spill {spills} bytes; use smaller blocks" if spills else 0)


def compile_gradient(
    target_config: str, batch: int, length: int, d_inner: int, d_state: int, dtype: str, *, implementation: str
) -> float:
    """Compiles the selective scan with its gradients with respect to all inputs.

    Args:
      target_config: description of the device, a GpuTargetConfigProto in text form.
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      dtype: of the sequences u, delta, B, C and z; the other inputs are float32.
      implementation: name of the implementation.

    Returns:
      The size of the temporary arrays in megabytes.
    """
    import jax
    from jax.experimental import topologies

    from benchmarks.tpu_compiler import temporary_bytes
    from sisma_jax.kernels.selective_scan.api import IMPLEMENTATIONS as FUNCTIONS

    topology = topologies.get_topology_desc(platform="cuda", target_config=target_config, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    sequence, projection = (struct((batch, length, size), dtype) for size in (d_inner, d_state))
    channels = struct((d_inner,), "float32")
    arguments = dict(u=sequence, delta=sequence, A=struct((d_inner, d_state), "float32"), B=projection, C=projection)
    arguments |= dict(D=channels, z=sequence, delta_bias=channels)
    arguments |= dict(initial_state=struct((batch, d_inner, d_state), "float32"))

    def gradient(arguments: dict[str, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> Any:
        outputs, vjp = jax.vjp(lambda x: FUNCTIONS[implementation](**x, delta_softplus=True), arguments)
        return outputs, vjp(cotangents)

    cotangents = (sequence, arguments["initial_state"])
    compiled = jax.jit(gradient).lower(arguments, cotangents).compile()
    return temporary_bytes(compiled) / 1e6


def register_usage(dump: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """Returns {name: (registers per thread, bytes spilled, ex2 instructions)} of the kernels of the scan in `dump`.

    All files in the folder are deleted.

    Raises:
      StopIteration: ptxas is not installed; see requirements-cuda.txt.
      CalledProcessError: ptxas refuses the PTX.
    """
    ptxas = next(path for root in sys.path for path in pathlib.Path(root).glob("nvidia/cuda_nvcc/bin/ptxas"))
    # XLA appends a number to the name of a kernel that it calls more than once.
    name = r"(selective_scan\w*?)(?:_mosaic_gpu_kernel)?(?:__\d+)?"
    pattern = rf"entry function '{name}' for.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = {}
    for file in sorted(dump.iterdir()):
        if file.suffix == ".ptx" and file.stat().st_size:  # XLA also dumps an empty file
            ptx, report = file.read_text(), file.with_suffix(".ptxas")
            if report.exists():  # Mosaic GPU's own assembler, whose version of PTX the other one may not know
                text = report.read_text()
            else:
                command = [ptxas, "-v", "-arch=sm_90a", "-o", os.devnull, file]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            entries = {entry[0]: entry[1] for entry in re.findall(rf"\.entry {name}\((.*?)\n}}", ptx, re.DOTALL)}
            for kernel, spilled, registers in re.findall(pattern, text, re.DOTALL):
                found[kernel] = (int(registers), int(spilled), entries[kernel].count("ex2."))
    for file in dump.iterdir():
        file.unlink()
    return found


if __name__ == "__main__":
    main()
