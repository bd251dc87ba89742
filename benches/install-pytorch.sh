#!/usr/bin/env bash
# Installs the peer that the benchmarks run beside: PyTorch without the parts a CPU run never loads.
# Takes about 4 GB and a few minutes. Usage: benches/install-pytorch.sh VENV
set -euo pipefail
venv=${1:?usage: install-pytorch.sh VENV}
[ -x "$venv/bin/torchrun" ] && "$venv/bin/python" -c 'import torch' 2>/dev/null && exit 0
python3 -m venv "$venv"
pip() { "$venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip --no-deps torch==2.15.0
pip filelock typing-extensions -U setuptools sympy networkx jinja2 fsspec numpy safetensors
# The wheel links against these even when no GPU is used.
pip --no-deps nvidia-cuda-runtime==13.2.86 nvidia-cublas==13.4.1.3 nvidia-cusparse==12.7.10.12 \
    nvidia-nvjitlink==13.2.86 nvidia-cufft==12.2.0.57 nvidia-cufile==1.17.1.22 \
    nvidia-cuda-cupti==13.2.86 nvidia-cuda-nvrtc==13.2.86 nvidia-nvshmem-cu13==3.7.2 \
    nvidia-nccl-cu13==2.30.7 nvidia-cusparselt-cu13==0.8.1 nvidia-cudnn-cu13==9.26.0.51
