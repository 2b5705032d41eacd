# The developer's front door: `just` lists what there is. (pip install rust-just, or `cargo install just`.)
set shell := ["bash", "-euo", "pipefail", "-c"]

_list:
    @just --list

# Build the extension into the current environment, in place of the installed package
build:
    pip install --no-build-isolation -e '.[test,plot,hub,dev]'

# The fast tests (README's test command, without the install)
test *args:
    python -m pytest {{ args }}

# The slow tests
slow *args:
    python -m pytest -m slow {{ args }}

# The long ones: a hundred kills, half a million mutated files, two thousand steps without a leak; an hour or two
soak *args:
    python -m pytest -m soak {{ args }}

# The C++ harness: release
cpp:
    cmake --preset release && cmake --build --preset release && ctest --preset release

# The C++ harness under AddressSanitizer and UndefinedBehaviorSanitizer
asan:
    cmake --preset asan-ubsan && cmake --build --preset asan-ubsan && ctest --preset asan-ubsan

# The C++ harness under ThreadSanitizer
tsan:
    cmake --preset tsan && cmake --build --preset tsan && ctest --preset tsan

# The C++ harness for aarch64, emulated (Debian: g++-aarch64-linux-gnu, qemu-user)
neon:
    cmake --preset neon && cmake --build --preset neon && ctest --preset neon

# The CUDA kernels with nvcc alone: registers, spills, occupancy, instructions (pip install nvidia-cuda-nvdisasm)
cuda *args:
    cmake --preset release && cmake --build --preset release --target tutelage_simt_tests
    python tools/check_cuda.py build/release {{ args }}

# Kernels, the training step, rollouts and loops against the machine's ceilings and peers
bench *args:
    tutelage bench kernels {{ args }}
    tutelage bench train {{ args }}
    tutelage bench rollout {{ args }}
    tutelage bench loops {{ args }}
    tutelage bench label

# ruff, mypy, clang-format, weak symbols
lint:
    ruff check . && ruff format --check .
    mypy
    MYPYPATH=python mypy --strict bench
    MYPYPATH=python:examples mypy --strict examples/{common,movies,addition,preferences}
    python tools/check_symbols.py
    clang-format --dry-run --Werror $(git ls-files 'cpp/*.h' 'cpp/*.cc' 'cpp/*.inc' 'tests/cpp/*.h' 'tests/cpp/*.cc' 'cuda/*.h' 'cuda/*.cc' 'cuda/*.cu' 'cuda/*.cuh' 'tests/simt/*.h' 'tests/simt/*.cc' 'tools/*.cc')

# Write what lint would ask for
format:
    ruff check --fix . && ruff format .
    clang-format -i $(git ls-files 'cpp/*.h' 'cpp/*.cc' 'cpp/*.inc' 'tests/cpp/*.h' 'tests/cpp/*.cc' 'cuda/*.h' 'cuda/*.cc' 'cuda/*.cu' 'cuda/*.cuh' 'tests/simt/*.h' 'tests/simt/*.cc' 'tools/*.cc')

