"""VLAs with a backbone of transformers: tokens, padding, routing, action tokens, files, OpenVLA's layout, bad input."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vla_parts import SIZE, TASKS, two_tasks

import xdfast.nn
from xdfast.losses import ActDistillLoss
from xdfast.models import budget_loss
from xdfast.models.checkpoint import CheckpointError
from xdfast.robot.vla import (
    HuggingFaceSpec,
    HuggingFaceVLA,
    MultiTaskLoader,
    Observation,
    check_teacher,
    derive_student,
    hidden_states,
    load_hf_vla,
    save_hf_vla,
)

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("xdfast.robot.vla.hf")

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4
SENTENCES = ("Open the drawer", "Close the drawer")
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BACKBONES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "SmolLM3": {},
    "Mistral": {"sliding_window": 6},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 6},
}
HEADS = ("regression", "bins", "diffusion")


def backbone(name: str = "Llama", **options):
    return getattr(transformers, f"{name}Config")(**{**SIZES, **BACKBONES.get(name, {}), **options})


def make(name: str = "Llama", *, config=None, vision="test_vit", **settings) -> HuggingFaceVLA:
    sizes = {
        "action_dim": 4, "state_dim": 9, "cameras": ("dp3",), "image_size": (SIZE, SIZE), "horizon": 2, "n_action": 2,
        "text_length": 8, "begin": 1, "vision_size": 32, "sentences": SENTENCES,
    } | settings  # fmt: skip
    vla = HuggingFaceVLA.from_config(config or backbone(name), vision, **sizes)
    with torch.no_grad():  # as far from the start as a trained one
        for parameter in vla.layers.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter), alpha=0.2)
        vla.layers.model.embed_tokens.weight[0] = 0
    return vla.eval()


def observe(vla: HuggingFaceVLA, told=("Open the drawer", "drawer", "close drawer")) -> Observation:
    spec, rows = vla.spec, len(told)
    images = torch.randint(0, 256, (rows, len(spec.cameras), 1, *spec.image_size, 3), dtype=torch.uint8)
    return Observation(images, torch.randn(rows, 1, 9), vla.tokenizer.encode_all(told, spec.text_length))


def act(vla: HuggingFaceVLA, seen: Observation) -> torch.Tensor:
    return vla.act(seen.images, seen.state, seen.instruction)


# --- a teacher


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_every_backbone_and_head_is_a_teacher(name, head) -> None:
    vla = make(name, head=head)
    check_teacher(vla)
    seen = observe(vla)
    tokens = vla.embed(seen)
    assert tokens.shape == (3, vla.num_tokens, vla.dim) and vla.num_layers == LAYERS
    states = hidden_states(vla.layers, tokens)
    assert len(states) == LAYERS + 1 and all(state.shape == tokens.shape for state in states)
    assert torch.equal(states[-1], vla.layers(tokens))
    chunk = vla.actions(seen)
    assert chunk.shape == (3, 2, 4) and torch.equal(chunk, vla.decode(states[-1]))
    torch.testing.assert_close(act(vla, seen), chunk)  # for bins: with a KV cache, token by token


@torch.no_grad()
def test_it_computes_what_transformers_computes() -> None:
    vla = make("Llama", head="bins")
    model = transformers.LlamaForCausalLM(backbone()).eval()
    inner = vla.layers.model.state_dict()
    state = {f"model.{name}": value for name, value in inner.items()} | {"model.norm.weight": vla.norm.weight}
    weight = torch.full((300, 32), -1e3)  # no word is as likely as an action
    weight[-256:] = vla.head.linear.weight
    model.load_state_dict({**state, "lm_head.weight": weight})
    seen = observe(vla, ("open the drawer",))
    prompt = vla.prompt(vla.features(seen.images), seen.state, seen.instruction)
    real = vla.layers.real(prompt)
    prompt = prompt[real][None]  # without padding
    model.lm_head.weight[:44] = 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(300).index_fill_(0, torch.arange(44), -1e4))
    ids = model.generate(
        inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long), max_new_tokens=8, min_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(vla.head.centres(ids - 44), vla.actions(seen))


@torch.no_grad()
def test_tokens_are_begin_pictures_words_state_and_queries() -> None:
    vla = make(cameras=("a", "b"), queries=1)
    seen = observe(vla, ("open drawer", "close drawer"))
    assert vla.vision.tokens == 4 and vla.groups == {"vision": (1, 9), "language": (9, 17)} and vla.num_tokens == 19
    base = vla.embed(seen)

    def moved(**changed) -> list[int]:
        other = vla.embed(Observation(**{**vars(seen), **changed}))
        return (other != base).any(-1).any(0).nonzero().flatten().tolist()

    assert moved(state=seen.state + 1) == [17]
    assert moved(instruction=seen.instruction.flip(0)) == [15]
    second = seen.images.clone()
    second[:, 1] = 255 - second[:, 1]
    assert moved(images=second) == [5, 6, 7, 8]
    assert make(begin=None).groups["vision"] == (0, 4)
    bigger = make(vision_size=64, text_length=5)
    assert bigger.groups == {"vision": (1, 17), "language": (17, 22)}  # from the sizes, nowhere 1 to 256


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@torch.no_grad()
def test_padding_changes_nothing(name, head) -> None:
    short = make(name, head=head)
    long = make(name, head=head, text_length=13)
    long.load_state_dict(short.state_dict())
    for vla in (short, long):
        vla.student = vla.route(0.9)
        vla.student.layers.routed.router.head.weight.normal_()
    long.student.load_state_dict(short.student.state_dict())
    seen = observe(short)
    padded = Observation(
        seen.images, seen.state, long.tokenizer.encode_all(["Open the drawer", "drawer", "close drawer"], 13)
    )
    torch.testing.assert_close(long.actions(padded), short.actions(seen), rtol=1e-4, atol=1e-5)
    told = padded.instruction
    behind = torch.stack([torch.cat([row[row != 0], row[row == 0]]) for row in told])
    assert torch.equal(long.embed(Observation(seen.images, seen.state, behind)), long.embed(padded))
    for number in range(3):  # alone as in a batch
        one = Observation(*(x[number : number + 1] for x in (seen.images, seen.state, seen.instruction)))
        torch.testing.assert_close(short.actions(one)[0], short.actions(seen)[number], rtol=1e-4, atol=1e-5)
    if name == "Gemma2":  # the garbage in a padding token's own place is seen by nobody
        short.layers.model.embed_tokens.weight[0] = 7.0
        torch.testing.assert_close(long.actions(padded), short.actions(seen), rtol=1e-4, atol=1e-5)
        short.layers.model.embed_tokens.weight[0] = 0.0
    short.student.actions(seen), long.student.actions(padded)
    a, b = (vla.student.layers.decision.probabilities for vla in (short, long))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert short.layers.real(short.embed(seen))[:, 5:13].sum(1).tolist() == [3, 1, 2]


# --- routed


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_all_gates_one_is_the_original_and_half_is_the_masked_one(name, head) -> None:
    vla = make(name, head=head)
    student = vla.route(0.8)
    check_teacher(student)
    stack, seen = student.layers.routed, observe(vla)
    expected, tokens = vla.actions(seen), vla.embed(seen)
    groups = [(group.start, group.stop) for group in stack.router.groups]
    assert groups == list(vla.groups.values()) and student.xdfast_route.tokens == vla.num_tokens
    with xdfast.nn.fixed_gates(student, torch.ones(3, LAYERS)):
        for executor in ("dense_mask", "cpu", "planned"):
            stack.executor = executor
            torch.testing.assert_close(student.layers(tokens), vla.layers(tokens), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(student.actions(seen), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(act(student, seen), expected, rtol=1e-5, atol=1e-5)
    half = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 0, 1]])
    found = {}
    with xdfast.nn.fixed_gates(student, half):
        for executor in ("dense_mask", "cpu"):
            stack.executor = executor
            found[executor] = (student.layers(tokens), student.actions(seen), act(student, seen))
            counted = student.layers.flops(student.num_tokens)
            assert counted.executor == executor and counted.nominal < counted.dense
    real = student.layers.real(tokens)
    torch.testing.assert_close(found["cpu"][0][real], found["dense_mask"][0][real], rtol=1e-5, atol=1e-5)
    for a, b in zip(found["cpu"][1:], found["dense_mask"][1:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a, found["cpu"][1], rtol=1e-5, atol=1e-5)  # decoding keeps the prompt's gates


@torch.no_grad()
def test_a_skipped_layer_is_the_identity_and_can_be_tapped() -> None:
    vla = make()
    student = vla.route(0.5, router={"hidden": 8})
    tokens = vla.embed(observe(vla))
    with xdfast.nn.fixed_gates(student, torch.tensor([[1.0, 0, 1, 1]]).repeat(3, 1)):
        states = hidden_states(student.layers, tokens)
    assert len(states) == LAYERS + 1 and torch.equal(states[1], states[2]) and not torch.equal(states[2], states[3])
    assert student.layers.routed.router.hidden == 8
    with pytest.raises(ValueError, match=r"not routed; vla.route"):
        vla.layers.flops(19)


@pytest.mark.parametrize("routing", ["learned", "static", "random"])
@torch.no_grad()
def test_students_and_their_baselines(routing, tmp_path) -> None:
    vla = make(head="bins")
    seen = observe(vla)
    states = hidden_states(vla.layers, vla.embed(seen))
    student = derive_student(vla, 0.8, routing=routing, states=states).eval()
    if routing == "learned":
        student.layers.routed.router.head.bias[1] = -50.0
        student.layers.routed.router.head.weight.normal_()
    acted = act(student, seen)
    decided = student.layers.decision.gates  # once, at the prompt
    if routing != "random":
        student.actions(seen)
        assert torch.equal(student.layers.decision.gates, decided) and 0 < float(decided.mean()) < 1
        again = load_hf_vla(save_hf_vla(student, tmp_path))
        assert torch.equal(act(again, seen), acted) and torch.equal(again.layers.decision.gates, decided)
    assert not hasattr(vla, "xdfast_route") and acted.shape == (3, 2, 4)


def test_lora_in_a_student() -> None:
    vla = make()
    student = derive_student(vla, 0.8, lora=2)
    seen = observe(vla)
    with torch.no_grad(), xdfast.nn.fixed_gates(student, torch.ones(3, LAYERS)):
        torch.testing.assert_close(student.actions(seen), vla.actions(seen), rtol=1e-5, atol=1e-5)
    student.loss(_batch(vla, torch.zeros(3, 2, 4))).backward()
    learning = [name for name, p in student.layers.model.layers[1].named_parameters() if p.requires_grad]
    assert learning and all("lora" in name for name in learning)


def test_one_step_of_actdistill() -> None:
    teacher = make(horizon=4)
    student = teacher.route(0.6)
    seen, target = observe(teacher), torch.rand(3, 4, 4) * 2 - 1
    sizes = {"semantic_dim": 16, "hidden": 16, "rank": 4}
    heads = xdfast.nn.GraphEncapsulation(teacher.dim, LAYERS, teacher.chunk, teacher.action_dim, **sizes)
    with torch.no_grad():
        tokens = teacher.embed(seen)
        mask = teacher.layers.real(tokens)
        semantics, actions = heads(torch.stack(hidden_states(teacher.layers, tokens)[1:]), mask=mask)
    criterion, budget = ActDistillLoss(LAYERS), budget_loss(student)
    optimiser = torch.optim.AdamW([*student.parameters(), *heads.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        states = hidden_states(student.layers, student.embed(seen))
        found = heads(torch.stack(states[1:]), mask=mask)
        loss = criterion(*found, semantics, actions, target) + student.chunk_loss(states[-1], target)
        loss = loss + budget(student.layers.decision.gates)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and student.layers.decision.executor == "dense_mask"
    assert (student.layers.routed.router.head.bias.grad[1:-1] != 0).all()
    missing = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("head", HEADS)
def test_it_learns_from_demonstrations_what_it_is_told(head, tmp_path) -> None:
    data = two_tasks(tmp_path, horizon=2)
    vla = make(head=head, sentences=[s for told in data.sentences for s in told], text_length=16, tasks=TASKS).train()
    data.fit(vla)
    loader = MultiTaskLoader(data, vla.tokenizer, 16, 8, 12)
    optimiser = torch.optim.AdamW(vla.parameters(), lr=1e-3)
    losses = []
    for batch in loader.epoch(0):
        loss = vla.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    told = vla.eval().for_task("drawer-open")
    images, state = batch.images[:1], batch.state[:1]
    noise = told.noise(1, torch.Generator().manual_seed(0))
    assert told.act(images, state, noise).shape == (1, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(told.decide(images, state, noise), told.act(images, state, noise))


# --- bins


def test_bins_are_those_of_openvla() -> None:
    vla = make(head="bins", horizon=1, n_action=1)
    edges = np.linspace(-1, 1, 256)  # what its code computes
    centres = (edges[:-1] + edges[1:]) / 2
    actions = torch.cat([torch.linspace(-1.5, 1.5, 1021), torch.tensor([-1.0, 1.0, 0.0])]).view(-1, 1, 4)
    index = vla.head.encode(actions)
    ids = 300 - np.digitize(np.clip(actions.double().numpy(), -1, 1), edges)
    assert np.array_equal(300 - 256 + index.numpy(), ids[:, 0])
    decoded = centres[np.clip(300 - ids - 1, 0, 254)]
    found = vla.head.centres(index)
    torch.testing.assert_close(found, torch.from_numpy(decoded).float())
    assert float((found - actions.clamp(-1, 1)).abs().max()) <= 1 / 255 + 1e-6
    assert torch.equal(vla.head.centres(vla.head.encode(found)), found)
    loss = vla.loss(_batch(vla, torch.zeros(3, 1, 4)))
    loss.backward()
    assert loss > 0 and vla.head.linear.weight.grad is not None


def _batch(vla, actions):
    batch = observe(vla)
    object.__setattr__(batch, "actions", actions)
    return batch


# --- other shapes and encoders


@torch.no_grad()
def test_the_first_layers_alone() -> None:
    whole = make("Gemma2")
    config = backbone("Gemma2")
    part = make(config=config, layers=2)
    assert part.num_layers == 2 and config.num_hidden_layers == LAYERS  # the user's stays
    part.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if ".layers.2." not in k and ".layers.3." not in k}
    )
    tokens = whole.embed(observe(whole))
    torch.testing.assert_close(part.layers(tokens), hidden_states(whole.layers, tokens)[2])


@torch.no_grad()
def test_vision_of_transformers_and_two_encoders_side_by_side() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    siglip = transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=16)
    dino = transformers.Dinov2WithRegistersConfig(**sizes, image_size=28, patch_size=14, num_register_tokens=2)
    vla = make(vision=[siglip, dino], vision_size=None, vision_level=-2)
    assert vla.vision.channels == 32 and vla.vision.tokens == 4 and vla.projector.fc3 is not None
    assert vla.features(observe(vla).images).shape == (3, 1, 4, 32) and act(vla, observe(vla)).isfinite().all()
    means = [tuple(round(float(v), 3) for v in e.mean.flatten()) for e in vla.vision.encoders]
    assert means == [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406)]
    with pytest.raises(ValueError, match=r"must have as many patches each, got \[4, 16\]"):
        make(vision=[siglip, transformers.SiglipVisionConfig(**sizes, image_size=64, patch_size=16)], vision_size=None)
    with pytest.raises(ValueError, match="has 3 layers, vision_level=-4"):
        make(vision=siglip, vision_level=-4)
    with pytest.raises(ValueError, match="no image_size, so it is no ViT"):
        make(vision=transformers.ResNetConfig(), vision_size=None)
    with pytest.raises(ValueError, match="ResNetModel has no patches"):
        make(vision=transformers.ResNetConfig())
    with pytest.raises(ValueError, match="takes pictures of 32 px, got vision_size=64"):
        make(vision=transformers.SiglipVisionModel(siglip), vision_size=64)
    frozen = make(vision=transformers.SiglipVisionModel(siglip), vision_size=None, vision_level=-2).vision.encoders[0]
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if "head" in n or "layers.2" in n)


@torch.no_grad()
def test_bfloat16() -> None:
    vla = make(dtype=torch.bfloat16, head="diffusion", queries=1)
    assert vla.layers.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    chunk = act(vla, observe(vla))
    assert chunk.dtype == torch.float32 and chunk.isfinite().all()


# --- files


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *["in", ":", "what", "action", "should", "the", "robot", "take", "to", "open", "drawer", "?", "out"],
    ]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_files_rebuild_it(routed, own, tmp_path) -> None:
    options = {} if own else {"tokenizer": _tokenizer(), "sentences": ()}
    vla = make(dtype=torch.bfloat16, head="diffusion", **options)
    vla.action_norm.fit(torch.zeros(4), torch.full((4,), 3.0))
    if routed:
        vla = vla.route(0.6, router={"hidden": 8})
        vla.layers.routed.router.head.weight.normal_()
    folder = save_hf_vla(vla, tmp_path / "run" / "hf_vla", extra={"metrics": {"loss": 0.5}})
    again = load_hf_vla(tmp_path / "run")
    assert again.spec == vla.spec and not again.training and HuggingFaceSpec.from_dict(vla.spec.to_dict()) == vla.spec
    seen = observe(vla, ("open the drawer", "open"))
    assert torch.equal(again.tokenizer.encode("open the drawer", 8), vla.tokenizer.encode("open the drawer", 8))
    assert torch.equal(act(again, seen), act(vla, seen))
    assert torch.equal(act(HuggingFaceVLA.from_pretrained(folder), seen), act(vla, seen))
    assert json.loads((folder / "hf_vla.json").read_text())["metrics"] == {"loss": 0.5}
    assert {p.name for p in folder.iterdir()} >= {"hf_vla.json", "hf_vla.safetensors"}
    with pytest.raises(ValueError, match="holds a whole VLA with its settings; leave out horizon"):
        HuggingFaceVLA.from_pretrained(folder, horizon=3)


def test_damaged_and_missing_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Hugging Face VLA in .* \(no hf_vla.json\)"):
        load_hf_vla(tmp_path)
    folder = save_hf_vla(make(), tmp_path / "vla")
    weights, spec = folder / "hf_vla.safetensors", folder / "hf_vla.json"
    data, text = weights.read_bytes(), spec.read_text()
    weights.write_bytes(data[:500])
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_hf_vla(folder)
    weights.write_bytes(data)
    spec.write_text(text.replace('"horizon": 2', '"horizon": 4').replace('"queries": 2', '"queries": 4'))
    with pytest.raises(CheckpointError, match=r"do not fit HuggingFaceVLA: .*queries: \[2, 32\] in the file"):
        load_hf_vla(folder)
    spec.write_text(text[:40])
    with pytest.raises(CheckpointError, match="hf_vla.json is damaged"):
        load_hf_vla(folder)


def _openvla(folder, *, fused: bool = True, **changed):
    """A small model in OpenVLA's layout, from its published code's names, and what it computes."""
    import timm

    names = ["test_vit2", "test_vit"] if fused else ["test_vit2"]
    eyes = [timm.create_model(name, num_classes=0, img_size=32) for name in names]
    for block in eyes[0].blocks:  # LayerScale, as DINOv2's
        torch.nn.init.uniform_(block.ls1.gamma, 0.5, 1.5)
    channels = sum(eye.embed_dim for eye in eyes)
    language = transformers.LlamaForCausalLM(backbone(vocab_size=364)).eval()
    widths = [channels, 4 * channels, 32, 32] if fused else [channels, 32, 32]
    projector = torch.nn.ModuleDict({f"fc{i + 1}": torch.nn.Linear(*widths[i : i + 2]) for i in range(len(widths) - 1)})
    parts = {"featurizer": eyes[0], **({"fused_featurizer": eyes[1]} if fused else {})}
    state = {
        f"vision_backbone.{part}.{name.replace('.gamma', '.scale_factor')}": value
        for part, eye in parts.items()
        for name, value in eye.state_dict().items()
    }
    state |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
    state |= {f"language_model.{name}": value for name, value in language.state_dict().items()}
    stats = {"q01": [-2.0, 0.0, -1.0], "q99": [2.0, 1.0, 1.0], "mask": [True, True, False]}
    config = {
        "model_type": "openvla", "timm_model_ids": names, "image_sizes": [32] * len(names), "pad_to_multiple_of": 64,
        "timm_override_act_layers": [None] * len(names), "use_fused_vision_backbone": fused, "n_action_bins": 256,
        "norm_stats": {"bridge": {"action": stats}}, "text_config": json.loads(language.config.to_json_string()),
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForVision2Seq": "evil.Model"}, **changed,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the files ran')")
    names_of = sorted(state)
    shards = {"model-1.safetensors": names_of[::2], "model-2.safetensors": names_of[1::2]}
    for shard, chosen in shards.items():
        save_file({name: state[name].contiguous().clone() for name in chosen}, folder / shard)
    table = {name: shard for shard, chosen in shards.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    _tokenizer().save_pretrained(folder)
    return [eye.eval() for eye in eyes], projector, language


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_openvla_files_compute_what_openvla_computes(fused, tmp_path) -> None:
    eyes, projector, language = _openvla(tmp_path, fused=fused)
    vla = HuggingFaceVLA.from_pretrained(tmp_path, cameras=("front",), image_size=(32, 32))
    assert vla.spec.head == "bins" and vla.spec.action_dim == 3 and vla.spec.last_bin == 300 and not vla.training
    images = torch.randint(0, 256, (2, 1, 1, 32, 32, 3), dtype=torch.uint8)
    told = ["Open the drawer", "take the robot to the drawer"]
    ids = vla.tokenizer.encode_all(told, vla.spec.text_length)
    prompt = vla.tokenizer.source(
        "In: What action should the robot take to open the drawer?\nOut:", add_special_tokens=False
    )
    assert ids[0][ids[0] >= 0].tolist() == prompt["input_ids"] and vla.tokenizer.pad == -1

    # (id 0, its tokenizer's <unk>, has an embedding of zeros and is a word all the same)
    # its own steps: patches of the last block but one, projector, insertion after the first token, greedy generation
    pixels = images[:, 0, 0].permute(0, 3, 1, 2) / 255
    patches = []
    for eye in eyes:
        mean, std = (torch.tensor(eye.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        patches += eye.get_intermediate_layers((pixels - mean) / std, n={len(eye.blocks) - 2})
    seen = torch.cat(patches, 2)
    for number, layer in enumerate(projector.values()):
        seen = layer(torch.nn.functional.gelu(seen) if number else seen)
    words = language.get_input_embeddings()
    hidden, bins = torch.zeros(364, dtype=torch.bool), []
    hidden[300 - 256 : 300] = True
    for row in range(2):
        text = ids[row][ids[row] >= 0][None]
        x = torch.cat([words(torch.tensor([[1]])), seen[row : row + 1], words(text)], 1)
        found = []
        for _ in range(3):
            logits = language(inputs_embeds=x).logits[0, -1].masked_fill(~hidden, -torch.inf)
            found.append(int(logits.argmax()))
            x = torch.cat([x, words(torch.tensor([[found[-1]]]))], 1)
        bins.append(found)
    edges = np.linspace(-1, 1, 256)
    normalised = ((edges[:-1] + edges[1:]) / 2)[np.clip(300 - np.array(bins) - 1, 0, 254)]
    low, high = np.array([-2.0, 0.0, -1.0]), np.array([2.0, 1.0, 1.0])
    expected = np.where([True, True, False], 0.5 * (normalised + 1) * (high - low) + low, normalised)
    acted = vla.act(images, torch.zeros(2, 1, 0), ids)
    torch.testing.assert_close(acted[:, 0], torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-5)

    student = vla.route(0.8)
    with xdfast.nn.fixed_gates(student, torch.ones(2, LAYERS)):
        torch.testing.assert_close(student.act(images, torch.zeros(2, 1, 0), ids), acted)


def test_openvla_files_that_do_not_go(tmp_path) -> None:
    given = {"cameras": ("front",), "image_size": (32, 32)}
    _openvla(tmp_path / "a")
    fitting = HuggingFaceVLA.from_pretrained(
        tmp_path / "a", **given, head="regression", horizon=4, layers=2, state_dim=9, proprioception=True
    )
    assert fitting.num_layers == 2 and fitting.spec.queries == 4 and fitting.spec.n_action == 4
    with pytest.raises(ValueError, match="has no statistics 'brigde'; there are bridge. Did you mean 'bridge'"):
        HuggingFaceVLA.from_pretrained(tmp_path / "a", **given, statistics="brigde")
    with pytest.raises(ValueError, match="do not tell cameras, image_size; pass cameras=, image_size="):
        HuggingFaceVLA.from_pretrained(tmp_path / "a")
    shard = tmp_path / "a" / "model-2.safetensors"
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights file .*model-2.safetensors"):
        HuggingFaceVLA.from_pretrained(tmp_path / "a", **given)
    stats = {"action": {"q01": [0.0] * 3, "q99": [1.0] * 3}}
    _openvla(tmp_path / "b", norm_stats={"one": stats, "two": stats}, image_sizes=[48, 48])
    with pytest.raises(ValueError, match="statistics of 2 data sets; say with statistics= which it acts in: one, two"):
        HuggingFaceVLA.from_pretrained(tmp_path / "b", **given)
    with pytest.raises(CheckpointError, match=r"do not fit HuggingFaceVLA: .*of another shape \(vision"):
        HuggingFaceVLA.from_pretrained(tmp_path / "b", **given, statistics="one")
    with pytest.raises(CheckpointError, match="'model.vision.x' is no name of OpenVLA's layout"):
        from xdfast.robot.vla.hf_pretrained import openvla_state

        openvla_state({"model.vision.x": torch.zeros(1)}, fitting.spec, 2)


@torch.no_grad()
def test_a_published_language_model_gets_eyes(tmp_path) -> None:
    language = transformers.Qwen2ForCausalLM(backbone("Qwen2", tie_word_embeddings=True))
    language.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    given = {
        "cameras": ("a",), "image_size": (32, 32), "action_dim": 4, "state_dim": 9, "horizon": 2, "n_action": 2,
        "vision": "test_vit", "vision_size": 32, "vision_pretrained": False,
    }  # fmt: skip
    vla = HuggingFaceVLA.from_pretrained(tmp_path, **given, layers=2, head="bins")
    assert torch.equal(vla.layers[1].mlp.up_proj.weight, language.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(vla.head.linear.weight, language.lm_head.weight[-256:])
    assert vla.num_layers == 2 and vla.spec.begin == 1
    again = load_hf_vla(save_hf_vla(vla, tmp_path / "saved"))
    seen = observe(vla, ("open the drawer",))
    assert torch.equal(act(again, seen), act(vla, seen))
    with pytest.raises(ValueError, match="holds a qwen2, not a VLA of a layout known here .* needs vision="):
        HuggingFaceVLA.from_pretrained(tmp_path, **{**given, "vision": None})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot read a causal language model from"):
        HuggingFaceVLA.from_pretrained(tmp_path, **given)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; a name on the hub is 'owner/name'"):
        HuggingFaceVLA.from_pretrained("./nowhere")


def test_a_name_that_cannot_be_fetched(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"nobody/nothing could not be fetched .*pass the folder"):
        HuggingFaceVLA.from_pretrained("nobody/nothing", cameras=("a",), image_size=(32, 32))


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, s, t: (i[:, :1], s, t), r"expected images \[B, 2, 1, 24, 24, 3\] of cameras a, b, got \[3, 1, 1"),
        (lambda i, s, t: (i.float(), s, t), "expected uint8 images"),
        (lambda i, s, t: (i, s[..., :8], t), r"expected state \[3, 1, 9\], got \[3, 1, 8\]"),
        (lambda i, s, t: (i, s * float("nan"), t), "state is not finite"),
        (lambda i, s, t: (i, s, t[:, :5]), r"expected instruction ids \[3, 8\], got \[3, 5\]; vla.tokenizer"),
        (lambda i, s, t: (i, s, t.int()), "expected instruction ids of int64, got torch.int32"),
        (lambda i, s, t: (i, s, t + 900), r"ids must be 0 to 299 \(the vocabulary\) or 0 \(padding\), got 90"),
        (lambda i, s, t: (i, s, t * torch.tensor([[1], [0], [1]])), r"instructions of samples \[1\] are empty"),
    ],
)
@pytest.mark.parametrize("head", ["regression", "bins"])
def test_bad_observations(head, change, message) -> None:
    vla = make(cameras=("a", "b"), head=head)
    seen = observe(vla)
    bad = change(seen.images, seen.state, seen.instruction)
    with pytest.raises(ValueError, match=message):
        vla.act(*bad)
    with pytest.raises(ValueError, match=message):
        vla.embed(Observation(*bad))


def test_bad_instructions_and_actions() -> None:
    for vla in (make(), make(tokenizer=_tokenizer(), sentences=())):
        for text in ("", " ?! "):
            with pytest.raises(ValueError, match="is empty; say in words"):
                vla.tokenizer.encode(text, 8)
        with pytest.raises(ValueError, match=r"has 9 (words|tokens), the policy takes 8 \(text_length\)"):
            vla.instructed("open the drawer " * 3)
        with pytest.raises(TypeError, match="an instruction is a string, got int"):
            vla.tokenizer.encode(3, 8)
        with pytest.raises(ValueError, match="no instruction to encode"):
            vla.tokenizer.encode_all([], 8)
        told = vla.tokenizer.encode("Open the drawer", 8)
        assert vla.tokenizer.decode(told).endswith("the drawer")
    actions = torch.zeros(3, 2, 4)
    actions[1, 1, 2] = float("nan")
    for head in HEADS:
        vla = make(head=head)
        with pytest.raises(ValueError, match=r"actions are not finite \(NaN or infinity\) in samples \[1\]"):
            vla.loss(_batch(vla, actions))
        with pytest.raises(ValueError, match=r"expected actions \[3, 2, 4\], got \[3, 1, 4\]"):
            vla.loss(_batch(vla, actions[:, :1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "bin"}, "head must be one of regression, bins, diffusion, got 'bin'. Did you mean 'bins'"),
        ({"head": "bins", "queries": 2}, "asks by the tokens it generates; leave out queries=2"),
        ({"queries": 3, "horizon": 4}, r"queries must divide horizon \(4\), got 3"),
        ({"n_action": 5}, r"n_action \(5\) must not exceed horizon \(2\)"),
        ({"cameras": ()}, "a VLA needs a camera"),
        ({"vision": ()}, "a VLA needs a vision encoder"),
        ({"layers": 9}, "LlamaModel has 4 layers, asked for 9"),
        ({"text_length": 0}, "text_length must be ≥ 1, got 0"),
        ({"sentences": ()}, "give a tokenizer of transformers, or the words"),
        ({"prompt": "do it"}, "prompt must contain {instruction}"),
        ({"begin": 300}, r"begin must be an id below vocab_size \(300\), got 300"),
        ({"config": SIZES}, "backbone must be a configuration of transformers"),
        ({"config": {"model_type": "lama"}}, "transformers cannot build the backbone 'lama'"),
        ({"vision_level": 0}, "counts from the last"),
    ],
)
def test_bad_specs(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**given)


def test_backbones_that_do_not_go() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300}
    with pytest.raises(ValueError, match="GPT2Model is no decoder with layers, norm and embed_tokens as in Llama"):
        make(config=transformers.GPT2Config(**sizes))
    with pytest.raises(ValueError, match="CohereDecoderLayer is no pre-norm layer .* cannot be routed"):
        make(config=transformers.CohereConfig(**SIZES))
    with pytest.raises(ValueError, match=r"Granite.* computes something else"):
        make(config=transformers.GraniteConfig(**SIZES, residual_multiplier=0.5)).route(0.8)
    with pytest.raises(ValueError, match=r"needs 256 ids of 200 before last_bin=200"):
        make(config=backbone(vocab_size=200), head="bins")
    with pytest.raises(ValueError, match="padding has id 299, which is an action id"):
        make(config=backbone(pad_token_id=299), head="bins")
    with pytest.raises(ValueError, match=r"the tokenizer has 16 ids, the backbone 10 \(vocab_size\)"):
        make(config=backbone(vocab_size=10), tokenizer=_tokenizer(), sentences=())
    with pytest.raises(TypeError, match="tokenizer must be one of transformers .* got str"):
        make(tokenizer="llama", sentences=())


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(hf).failed == 0


def test_the_code_in_the_docs_runs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "vla.md").read_text(encoding="utf-8")
    section = text.partition("## Hugging Face VLAs\n")[2].partition("\n## ")[0]
    code = section.partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(compile(code, "docs/vla.md", "exec"), names)
    assert names["actions"].shape == (1, 1, 4) and len(names["states"]) == 5
