# syntax=docker/dockerfile:1
# foldserve on vLLM's own CUDA image, as its user `vllm`. From the root of the repository:
#   docker build -t foldserve .
#   docker run --gpus all --ipc host -p 8000:8000 -v foldserve-models:/home/vllm/.cache/huggingface \
#     foldserve llava-hf/llava-1.5-7b-hf --max-model-len 4096
# docs/guides/operations.md has the rest; deploy/Dockerfile.cpu is the same without a GPU.

# The Python of vLLM's image, so that a wheel which it would refuse isn't built.
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
ARG VLLM_VERSION=0.32.0
ARG FOLDSERVE_VERSION=0.2.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="foldserve" \
      org.opencontainers.image.description="Vision-language models with fewer vision tokens, on vLLM ${VLLM_VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${FOLDSERVE_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v${VLLM_VERSION}"

# The wheel, then what vLLM doesn't bring of its dependencies. All that the image has stays as it is: what doesn't fit is an
# error here, rather than another torch. The image's other complaints (it overrides some of torch's pins) are its own.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip list --format=freeze > /tmp/base.txt \
    && python3 -m pip install --no-cache-dir --no-deps /wheels/foldserve-*.whl \
    && python3 -m pip install --no-cache-dir --constraint /tmp/base.txt "aiodns>=4" "av>=16" "jiter>=0.11" "limits>=5.6" "yarl>=1.18" \
    && (python3 -m pip check > /tmp/check.txt || ! grep "^foldserve " /tmp/check.txt) \
    && rm /tmp/base.txt /tmp/check.txt \
    && foldserve --version \
    && install -d -o vllm -g 0 -m 775 /home/vllm/.cache /home/vllm/.cache/huggingface

# PYTHONSAFEPATH: what lies in the working directory must not be imported.
ENV PYTHONSAFEPATH=1 \
    HOME=/home/vllm \
    HF_HOME=/home/vllm/.cache/huggingface \
    VLLM_NO_USAGE_STATS=1
# `vllm` in the base image; by number, so that Kubernetes can tell that it is not root.
USER 2000:0
WORKDIR /home/vllm
EXPOSE 8000
# On SIGTERM the server drains: --shutdown-timeout (30 s) for requests, then up to 10 s for the engine. Give it that time:
# docker stop --time 60.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=5s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["foldserve", "serve"]
