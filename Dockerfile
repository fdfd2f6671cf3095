# Image of imgcls for Ray nodes, jobs and servers.
#   docker build -t imgcls:0.1.0 .
#   docker build -t imgcls:0.1.0-cpu --build-arg TORCH_INDEX=URL .
# By default pip installs torch with CUDA, which also runs on machines without a GPU. The URL of an
# index with builds for CPUs only (some GB smaller), or for another CUDA version, is on PyTorch's
# page "Start Locally".
# Python 3.11 and constraints.txt: the versions that the tests run with.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

ARG TORCH_INDEX=
# Extras of pyproject.toml, at least one, such as demo,gcs,azure
ARG EXTRAS=demo

# wget: KubeRay's probes. procps: `ray stop`. Debian removes older versions, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ray && mkdir -p /home/ray/imgcls/results \
    && chown -R ray /home/ray
WORKDIR /home/ray/imgcls

# The dependencies first, in a layer that is kept when only the package changes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir imgcls && touch imgcls/__init__.py \
    && pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[${EXTRAS}]" \
    && rm -rf build imgcls imgcls.egg-info

COPY . .
RUN pip install --no-cache-dir --no-deps --force-reinstall . \
    && rm -rf build imgcls imgcls.egg-info

# ray, as a number: Kubernetes cannot check that a name is not root (runAsNonRoot)
USER 1000
ENV PYTHONUNBUFFERED=1
# Ray's head node, dashboard and metrics; imgcls serve
EXPOSE 6379 8265 8080 8000
CMD ["imgcls", "--help"]
