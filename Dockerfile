# Learner and actor as images, installed by the same pins as on a host (tools/bootstrap.sh, hashes checked).
#   docker build --target learner -t flowserl-learner .
#   docker run --gpus all --shm-size 32g --network host -v $PWD/runs:/flowserl/runs flowserl-learner task=pick run=night1
#   docker build --target actor -t flowserl-actor .
#   docker run -it --network host -v $PWD/runs:/flowserl/runs flowserl-actor ip=gpu-box task=pick run=night1
# --shm-size: the replay ring lies in /dev/shm. Devices of an arm: --device /dev/ttyACM0. docs/cluster.md
FROM python:3.12-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends git openssh-client tmux libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /flowserl
COPY . .
ENV MUJOCO_GL=egl PYTHONUNBUFFERED=1

FROM base AS actor
RUN bash tools/bootstrap.sh actor && rm -rf /root/.cache
ENTRYPOINT ["bash", "run_actor.sh"]

FROM base AS learner
RUN bash tools/bootstrap.sh learner && rm -rf /root/.cache
EXPOSE 5588 5589 5592
ENTRYPOINT ["bash", "run_learner.sh"]
