"""What other projects call a key, and the key of ours that does it: compose answers with it where a word of the
command line is no key here.

The first word of each answer is a key of the config. HIL-SERL: its DefaultTrainingConfig; LeRobot: the JSON of
lerobot.rl; the others: Hydra configs with `training.` and `logging.`.
"""

ELSEWHERE = {
    # training. and logging.
    "training.num_gpus": "launch.num_processes, by launch=several|zero2|fsdp2 (auto: every visible GPU)",
    "training.mixed_precision": "policy.precision=float32|bfloat16",
    "training.batch_size": "trainer.batch_size, of all GPUs together",
    "training.learning_rate": "trainer.optimizer.lr",
    "training.lr": "trainer.optimizer.lr",
    "training.seed": "seed",
    "logging.logger": "telemetry.wandb=true, telemetry.tensorboard=true",
    "logging.project": "telemetry.project",
    # HIL-SERL
    "checkpoint_period": "trainer.checkpoint_period",
    "demo_path": "demos",
    "log_period": "trainer.log_period",
    "max_steps": "schedule.stages, whose `steps` are counted for each stage",
    "replay_buffer_capacity": "replay.capacity_frames",
    "steps_per_update": "trainer.publish_period, steps between two versions that actors get",
    "training_starts": "algo.min_accepted, accepted episodes before online training starts",
    # LeRobot
    "policy.actor_learner_config.learner_host": "ip, of the actor",
    "policy.actor_learner_config.learner_port": "port",
    "policy.online_buffer_capacity": "replay.capacity_frames",
    "policy.offline_buffer_capacity": "replay.capacity_frames, which demonstrations share",
    "policy.online_steps": "schedule.stages, whose `steps` are counted for each stage",
    "policy.device": "trainer.device and serving.device",
    "policy.pretrained_path": "checkpoint_path of a run of ours; policy.checkpoint=<folder> of LeRobot's weights",
    "dataset.repo_id": "demos=<name on the hub or folder>; of train_sft.py the first argument",
    "steps": "schedule.stages, whose `steps` are counted for each stage; of train_sft.py sft.steps",
    "save_freq": "trainer.checkpoint_period; of train_sft.py sft.save_period",
    "log_freq": "trainer.log_period; of train_sft.py sft.log_period",
    "output_dir": "runs_dir and run",
    "job_name": "run",
    "wandb.enable": "telemetry.wandb",
    "wandb.project": "telemetry.project",
    "wandb.entity": "telemetry.entity",
}
