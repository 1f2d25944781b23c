# Trains on one machine with NVIDIA GPUs:
#   docker build -t dylora .
#   docker run --gpus all -v "$PWD/runs:/runs" dylora train --config quickstart --output_dir /runs
# For drivers older than torch's default CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04
ARG TORCH_INDEX=https://pypi.org/simple
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && useradd --create-home --uid 10001 dylora
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/dylora
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --index-url "$TORCH_INDEX" -c constraints.txt torch
COPY dylora dylora
RUN pip install -c constraints.txt '.[report,wandb,quant]'
USER dylora
WORKDIR /home/dylora
ENTRYPOINT ["dylora"]
CMD ["--help"]
