"""Runs GR00T N1.5's public implementation on `n1_5_case` and records what it gives in n1_5_reference.json.

    pip download --no-deps lerobot==0.5.1; unzip it; python n1_5_reference.py <its lerobot/policies/groot>

The last LeRobot that carries NVIDIA's N1.5 model code. Three things are changed in a copy before it runs: attention is
eager where it insists on flash-attn (which needs a GPU), Eagle's configuration is the tiny one, and a configuration
class is no dataclass, as transformers wants it since 5.4.
"""

import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from n1_5_case import AD, AH, SIZE, SLOT, SPEC, STEPS, WIDE, B, chunk_noise_time, fill, measured, observation
from transformers.feature_extraction_utils import BatchFeature

from serl_launcher.policies.normalise import Units

OUT = Path(__file__).with_suffix(".json")
FROM_CACHE = """        config = AutoConfig.from_pretrained(str(cache_dir), trust_remote_code=True)
        self.eagle_model = AutoModel.from_config(config, trust_remote_code=True)
"""
TINY = """        from groot_reference.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig
        from groot_reference.eagle2_hg_model.modeling_eagle2_5_vl import Eagle25VLForConditionalGeneration

        self.eagle_model = Eagle25VLForConditionalGeneration(Eagle25VLConfig(**EAGLE))
"""


def load(folder: Path):
    """Its module groot_n1 out of a changed copy."""
    copy = Path(tempfile.mkdtemp()) / "groot_reference"
    shutil.copytree(folder, copy)
    (copy / "__init__.py").write_text("")
    (copy / "eagle2_hg_model" / "__init__.py").write_text("")
    for path in copy.rglob("*.py"):
        text = path.read_text().replace("flash_attention_2", "eager")
        text = text.replace("lerobot.policies.groot.", "groot_reference.")
        text = text.replace("@dataclass\nclass GR00TN15Config", "class GR00TN15Config")
        path.write_text(text.replace(FROM_CACHE, TINY))
    sys.path.insert(0, str(copy.parent))
    return importlib.import_module("groot_reference.groot_n1")


def build(module):
    """The tiny model, in eval mode, its weights the waves of their names."""
    config = SIZE.config_fields(SPEC, AH)
    text = {**config.eagle["text_config"], "architectures": ["Qwen3ForCausalLM"], "attn_implementation": "eager"}
    vision = {**config.eagle["vision_config"], "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
    module.EAGLE = {**config.eagle, "text_config": text, "vision_config": vision}
    module.ensure_eagle_cache_ready = lambda *a: None
    fields = {key: config.fields[key] for key in ("backbone_cfg", "action_head_cfg", "action_horizon", "action_dim")}
    model = module.GR00TN15(module.GR00TN15Config(**fields, compute_dtype="float32"), local_model_path="")
    fill(model.float().eval())
    model.backbone.set_trainable_parameters(tune_llm=True, tune_visual=True)
    model.action_head.set_trainable_parameters(True, True)
    return model.eval()


def main(folder: str) -> None:
    module = load(Path(folder))
    model, given = build(module), observation()
    inputs = SIZE.inputs(tuple(SPEC.cameras))(given.images, given.prompts, torch.device("cpu"))
    batch = {f"eagle_{name}": tensor for name, tensor in inputs.items()} | {"eagle_image_sizes": torch.zeros(1)}
    state = torch.zeros(B, 1, 5)
    state[:, 0, :3] = Units.from_spec(SPEC).state.to_model(torch.tensor(given.state))
    mask = torch.zeros(B, AH, WIDE)
    mask[..., :AD] = 1
    chunk, noise, t = chunk_noise_time()
    batch |= {"state": state, "embodiment_id": torch.full((B,), SLOT), "action": chunk, "action_mask": mask}
    torch.randn = lambda *a, **k: noise.clone()
    model.action_head.sample_time = lambda *a, **k: t
    with torch.no_grad():
        backbone = model.backbone(BatchFeature(data=dict(batch)))
        hidden = model.action_head.process_backbone_output(BatchFeature(data=dict(backbone)))["backbone_features"]
        model.action_head.num_inference_timesteps = STEPS
        samples = model.get_action({k: v for k, v in batch.items() if not k.startswith("action")})["action_pred"]
    loss = model(dict(batch))["loss"]
    loss.backward()
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    recorded = {
        "backbone": measured(backbone["backbone_features"], "backbone"),
        "hidden": measured(hidden, "hidden"),
        "loss": float(loss),
        "samples": samples.tolist(),
        "gradients": {n: measured(p.grad, n) for n, p in model.named_parameters() if p.grad is not None},
        "tensors": tensors,
    }
    OUT.write_text(json.dumps(recorded) + "\n")
    print(f"{OUT}: loss {float(loss):.6f}, {len(recorded['gradients'])} gradients, {len(tensors)} tensors")


if __name__ == "__main__":
    main(sys.argv[1])
