# rlhf-t2i for NVIDIA GPUs: `docker build --tag rlhf-t2i:0.1.0 .`, then
#     docker run --rm --gpus all --ipc=host rlhf-t2i:0.1.0 demo --out /work/runs/quickstart
# docs/cluster.md has the same image under Slurm and Kubernetes.

# The compiler's image: DeepSpeed and torch.compile build kernels when a run first needs them.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The base's tag names the release of Ubuntu, whose archive keeps one version of each package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/rlhf-t2i \
    PATH=/opt/rlhf-t2i/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0
RUN python3 -m venv "$VIRTUAL_ENV"

# torch first, in a layer of its own: nothing later replaces it, and a change of the code does not download it again.
ARG TORCH=torch==2.13.0
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt "$TORCH" && pip freeze | grep '^torch==' > /opt/torch.txt

COPY pyproject.toml MANIFEST.in README.md LICENSE NOTICE ./
COPY rlhf_t2i rlhf_t2i
COPY plugins plugins
COPY recipes recipes
COPY zoo/emoji64 zoo/emoji64
RUN pip install -c constraints.txt -c /opt/torch.txt ./zoo/emoji64 '.[demo,datasets,tensorboard,8bit]'

# Nothing here needs root. Mount models, recipes and runs below /work.
RUN useradd --create-home --uid 10001 rlhf && install --directory --owner=rlhf /work
USER 10001
WORKDIR /work
ENTRYPOINT ["rlhf-t2i"]
CMD ["--help"]
