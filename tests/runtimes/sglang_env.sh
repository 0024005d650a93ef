#!/usr/bin/env bash
# Makes the environment of the SGLang-Diffusion tests: sglang_env.sh DIR. CPU torch, sglang and this checkout without their
# own dependency lists (sglang's names CUDA builds); then the dependencies that a diffusion model's server imports.
# About 3.2 GB on disk. Does again only what has changed since DIR was made.
set -euo pipefail

dir=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp_of() { cat "$@" | sha256sum | cut -c1-64; }
is_ready() { [[ -f $dir/$1 && $(cat "$dir/$1") == "$2" ]]; }
pip() { "$dir/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

packages=$(stamp_of "${BASH_SOURCE[0]}")
if ! is_ready .packages "$packages"; then
    "${PYTHON:-python3}" -m venv --clear "$dir"

    # Where pip would take a CUDA build: TORCH_INDEX=https://download.pytorch.org/whl/cpu
    pip install torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    pip install --no-deps sglang==0.5.23
    pip install \
        accelerate==1.15.0 addict aiohttp apache-tvm-ffi==0.1.11 'av>=18.1,<20' cache-dit==1.5.3 cloudpickle \
        compressed-tensors==0.20.0 diffusers==0.42.1 dill einops 'fastapi>=0.165' ftfy gguf==0.19.0 httpx httpx2 imageio \
        imageio-ffmpeg ipython msgpack msgspec openai opencv-python-headless orjson partial-json-parser 'pillow>=12' \
        'prometheus-client>=0.26' psutil pybase64 'pydantic>=2.14' pyjwt python-dateutil python-multipart pyyaml pyzmq regex \
        remote-pdb requests rich 'safetensors>=0.8' scipy sentencepiece setproctitle 'sqlalchemy>=2.1,<2.2' 'starlette>=1.10' \
        transformers==5.23.0 triton==3.9.0 'typer>=0.29' 'uvicorn[standard]>=0.54' uvloop websockets \
        'pytest>=9.2' 'pytest-timeout>=2.4'
    pip install --no-deps torchvision==0.28.0
    # torchvision is a CUDA build whose library cannot load here: what it says about the shapes of that library's operators
    # is left out.
    truncate --size 0 "$dir"/lib/python3*/site-packages/torchvision/_meta_registrations.py
    echo "$packages" > "$dir/.packages"
fi

# Their entry points are read from what is installed.
checkout=$(stamp_of "$here/cpu_platform/pyproject.toml" "$here/../../pyproject.toml")
if ! is_ready .checkout "$checkout"; then
    pip install --no-deps --editable "$here/cpu_platform"
    pip install --no-deps --editable "$here/../.."
    echo "$checkout" > "$dir/.checkout"
fi
