# nanochat on old cards: CUDA 12.6 is the last release whose PyTorch wheels hold kernels for a P100 and run on its drivers.
#
#   docker build -t nanochat .
#   docker run --gpus all -v nanochat:/data nanochat                       the whole pipeline (without --gpus: the demo)
#   docker run -it --gpus all -v nanochat:/data nanochat .venv/bin/python -m scripts.chat_cli
FROM nvidia/cuda:12.6.3-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates cargo gcc git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The Ubuntu image has a user `ubuntu` with id 1000. /data holds the results of runs.
RUN mkdir -p /nanochat /data && chown 1000:1000 /nanochat /data
USER 1000:1000
WORKDIR /nanochat
COPY --chown=1000:1000 . .

# No card is visible while the image is built, so the torch build is named instead of chosen.
ENV NANOCHAT_TORCH="torch==2.14.* --index-url https://download.pytorch.org/whl/cu126" \
    NANOCHAT_BASE_DIR=/data
RUN bash setup_env.sh

VOLUME /data
EXPOSE 8000
CMD ["bash", "speedrun_p100.sh"]
