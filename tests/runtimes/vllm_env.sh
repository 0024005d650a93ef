#!/usr/bin/env bash
# Makes the environment of the vLLM-Omni tests: vllm_env.sh DIR. CPU torch, both packages, and this checkout, all without
# their own dependency lists (vllm's names CUDA builds); then the dependencies that a diffusion model's server imports.
# About 0.9 GB to download and 3.6 GB on disk. Does again only what has changed since DIR was made.
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
    pip install --no-deps vllm==0.30.0 vllm-omni==0.30.0
    pip install \
        accelerate==1.12.0 aenum==3.1.16 aiohttp anthropic 'av>=18.1,<20' blake3 cachetools cbor2 cloudpickle depyf==0.20.0 \
        diffusers==0.40.0 einops 'fastapi[standard]>=0.133,<0.137' filelock ftfy 'gguf>=0.10' httpx httpx2 \
        'huggingface-hub>=1.31,<2' ijson 'imageio[ffmpeg]>=2.37.2' janus jsonschema lark==1.2.2 'llguidance>=1.7,<1.8' \
        lm-format-enforcer==0.11.3 loguru \
        'mcp>=2,<3' 'mistral-common[image]>=1.11.6' 'model-hosting-container-standards>=0.1.14,<1' msgpack msgspec \
        numba==0.65.0 'numpy<2.4' 'omegaconf>=2.3' openai-harmony 'openai>=2.25' 'opencv-python-headless>=4.13' \
        opentelemetry-api opentelemetry-exporter-otlp opentelemetry-sdk 'opentelemetry-semantic-conventions-ai>=0.4.1' \
        outlines-core==0.2.14 partial-json-parser pillow 'prettytable>=3.8' prometheus-client \
        'prometheus-fastapi-instrumentator>=8' 'protobuf>=6.33.5' psutil py-cpuinfo pybase64 'pydantic>=2.14' pydantic-settings \
        python-json-logger pyyaml 'pyzmq>=25' regex requests 'safetensors>=0.8' scipy sentencepiece setproctitle soundfile soxr \
        'starlette>=1.0.1' tiktoken 'tokenizers>=0.21.1' tqdm 'transformers>=5.13,<5.15' typing-extensions watchfiles websockets \
        'pytest>=9.2' 'pytest-timeout>=2.4'
    pip install --no-deps apache-tvm-ffi==0.1.11 cache-dit==1.5.0 compressed-tensors==0.17.0 kernels==0.16.1 torchaudio==2.11.0 \
        torchsde torchvision==0.28.0 trampoline 'xgrammar>=0.2.1,<1'
    # Both are CUDA builds whose libraries cannot load here. torchaudio is imported and never used; torchvision's Python wants
    # the schemas of two operators of its library.
    rm -f "$dir"/lib/python3*/site-packages/torchaudio/lib/*.so
    sed -i '1i import helios_vllm_cpu' "$dir"/lib/python3*/site-packages/torchvision/__init__.py
    echo "$packages" > "$dir/.packages"
fi

# Their entry points are read from what is installed.
checkout=$(stamp_of "$here/cpu_platform/pyproject.toml" "$here/../../pyproject.toml")
if ! is_ready .checkout "$checkout"; then
    pip install --no-deps --editable "$here/cpu_platform"
    pip install --no-deps --editable "$here/../.."
    echo "$checkout" > "$dir/.checkout"
fi
