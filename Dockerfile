# syntax=docker/dockerfile:1
# moco-dist and its extras (`all`) for NVIDIA GPUs with a driver for CUDA 13. Batch jobs only, so no HEALTHCHECK: a
# scheduler looks at the exit status.
#   docker build --tag moco-dist .
#   docker run --gpus all --shm-size 8g --volume DATA:/data:ro --volume RUNS:/runs moco-dist \
#       python -m moco_dist.launchers.torchrun --standalone --nproc-per-node 8 -m moco_dist pretrain CONFIG.yaml
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# A layer of its own: it is made anew only when the lock changes.
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs ./configs
COPY moco_dist ./moco_dist
RUN pip install --no-deps --no-build-isolation .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# Wheels bring CUDA's libraries. gcc and Python's headers: Triton compiles its launcher on the host where it runs.
# libibverbs and its drivers: NCCL loads them for InfiniBand and RoCE, and without them talks TCP.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc ibverbs-providers libc6-dev libibverbs1 \
    python3-dev tini && rm -rf /var/lib/apt/lists/*
# The venv's Python is the base's, by the same path in both stages.
COPY --from=build /opt/venv /opt/venv
COPY configs /opt/moco-dist/configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/moco-dist
USER 1000:1000
# A first process that passes SIGTERM on to torchrun, from its first moment.
ENTRYPOINT ["tini", "--"]
CMD ["moco-dist", "--help"]
