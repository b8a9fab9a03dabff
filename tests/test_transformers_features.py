"""What users of transformers expect of any model: attention kernels, checkpointing, compilation, devices, adapters."""

import warnings
from copy import deepcopy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from model_fixtures import norm_stats, tiny_config, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from vla_adapter_hf import VLAAdapterForActionPrediction
from vla_adapter_hf.modeling.modeling_vla_adapter import MASK_MAKERS, mask_maker


# As for the goldens.
ACTION_TOLERANCE = 3e-4


@pytest.fixture(scope="module", params=["pro", "original"])
def variant(request):
    return request.param


@pytest.fixture
def model(variant):
    return tiny_model(policy_variant=variant)


@pytest.fixture
def inputs(model):
    inputs = tiny_inputs(model.config)
    inputs["attention_mask"][0, :3] = 0  # one padded row
    return inputs


class one_device_per_operation(TorchDispatchMode):
    """An error from an operation on tensors of several devices, unless it copies. torch overlooks the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if function.overloadpacket is not torch.ops.aten._to_copy:
            assert len({tensor.device for tensor in tensors}) < 2, f"{function} of tensors on several devices"
        return function(*args, **(kwargs or {}))


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(**inputs, actions=torch.zeros(2, 4, 7)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestAttention:
    @pytest.mark.parametrize(
        "implementation",
        ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # compiles for minutes
    )
    def test_kernels_agree_with_sdpa(self, model, inputs, implementation):
        with torch.no_grad():
            expected = model(**inputs).actions
            model.set_attn_implementation(implementation)
            actions = model(**inputs).actions
        torch.testing.assert_close(actions, expected, rtol=0, atol=ACTION_TOLERANCE)

    def test_kernels_agree_on_the_published_checkpoint(self, published_pro, pro_model, processor, observation):
        inputs = processor(**observation)
        eager = AutoModel.from_pretrained(published_pro, attn_implementation="eager")
        difference = eager.predict_action(**inputs) - pro_model.predict_action(**inputs)
        assert abs(difference).max() < ACTION_TOLERANCE

    def test_the_choice_reaches_every_part(self, variant):
        model = AutoModel.from_config(tiny_config(policy_variant=variant), attn_implementation="eager")
        configs = [model.dinov2.config, model.siglip.config, model.language_model.config]
        configs.append(model.policy.blocks[0].attention.config)
        assert [config._attn_implementation for config in configs] == ["eager"] * 4

    def test_gradients_agree(self, model, inputs):
        expected = gradients(model.train(), inputs)
        model.set_attn_implementation("eager")
        for name, gradient in gradients(model, inputs).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gives_the_same_gradients(self, model, inputs, use_reentrant):
        expected = gradients(model.train(), inputs)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        checkpointed = gradients(model, inputs)
        if use_reentrant:
            # A reentrant checkpoint has no gradient where none of its inputs needs one, as the first layer's images.
            checkpointed = {name: g for name, g in checkpointed.items() if not name.startswith(("dinov2", "siglip"))}
        else:
            assert checkpointed.keys() == expected.keys()
        for name, gradient in checkpointed.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    def test_covers_towers_language_model_and_policy(self, model):
        model.gradient_checkpointing_enable()
        covered = {
            name.split(".")[0] for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)
        }
        assert {"dinov2", "siglip", "language_model", "policy"} <= covered


class TestCompile:
    """Graphs are traced, and without the mark `slow` run as they are; kernels take minutes to generate."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()

    def test_forward_is_one_graph_for_all_values_and_paddings(self, model, inputs):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        other = tiny_inputs(model.config, seed=1)
        other["attention_mask"][1, 7:] = 0
        with torch.no_grad():
            actions = compiled(**inputs).actions
            with torch.compiler.set_stance("fail_on_recompile"):
                other_actions = compiled(**other).actions
            torch.testing.assert_close(actions, model(**inputs).actions, rtol=0, atol=ACTION_TOLERANCE)
            torch.testing.assert_close(other_actions, model(**other).actions, rtol=0, atol=ACTION_TOLERANCE)

    def test_training_is_one_graph_too(self):
        model = tiny_model().train()
        inputs = tiny_inputs(model.config)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.manual_seed(0)
        compiled(**inputs, actions=torch.zeros(2, 4, 7)).loss.backward()
        actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in gradients(model, inputs).items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.slow
    def test_with_generated_kernels(self, model, inputs):
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            actions = compiled(**inputs).actions
            torch.testing.assert_close(actions, model(**inputs).actions, rtol=0, atol=ACTION_TOLERANCE)

    @pytest.mark.slow
    def test_generated_kernels_leave_no_rounding_out(self):
        # At 512 positions: a compiler that computed the policy's rotary tables would be wrong by as much as 1.2.
        config = tiny_config()
        towers = {name: getattr(config, name).to_dict() for name in ("dinov2_config", "siglip_config")}
        model = tiny_model(**{name: {**tower, "image_size": 224} for name, tower in towers.items()})
        assert model.config.num_task_tokens == 512
        inputs = tiny_inputs(model.config)
        with torch.no_grad():
            actions = torch.compile(model, fullgraph=True)(**inputs).actions
            torch.testing.assert_close(actions, model(**inputs).actions, rtol=0, atol=ACTION_TOLERANCE)


class TestBuildingAndPlacing:
    def test_a_model_can_be_built_on_the_meta_device(self, variant):
        with torch.device("meta"):
            model = AutoModel.from_config(tiny_config(policy_variant=variant))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    @pytest.mark.parametrize("device_map", ["cpu", "auto"])
    def test_a_device_map_places_everything(self, tmp_path, model, inputs, device_map):
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
        assert "meta" not in {parameter.device.type for parameter in loaded.parameters()}
        on_device = {name: value.to(loaded.device) for name, value in inputs.items()}
        with torch.no_grad():
            actions = loaded(**on_device).actions.cpu()
            torch.testing.assert_close(actions, model(**inputs).actions, rtol=0, atol=ACTION_TOLERANCE)

    def test_a_published_checkpoint_takes_a_device_map_and_a_dtype(self, published_pro, processor, observation):
        model = AutoModel.from_pretrained(published_pro, dtype=torch.bfloat16, device_map="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == torch.bfloat16
        assert model.predict_action(**processor(**observation)).shape == (1, 8, 7)

    def test_any_part_may_be_spilled_to_disk(self, tmp_path, model, inputs):
        del inputs["proprio"]
        expected = model.predict_action(**inputs, state=torch.zeros(2, 8))
        model.save_pretrained(tmp_path / "model")
        parts = {name: "cpu" for name, _ in model.named_children()}
        for name in parts:
            loaded = AutoModel.from_pretrained(
                tmp_path / "model", device_map={**parts, name: "disk"}, offload_folder=tmp_path / name
            )
            assert {parameter.device.type for parameter in loaded.get_submodule(name).parameters()} == {"meta"}
            actions = loaded.predict_action(**inputs, state=torch.zeros(2, 8))
            assert abs(actions - expected).max() < ACTION_TOLERANCE, name

    def test_parts_may_be_on_two_devices(self, variant):
        """As `device_map="auto"` spreads them. Tensors get to a part's device by accelerate's hooks and by ours."""
        in_order = ["dinov2", "siglip", "vision_projector", "language_model.embed_tokens", "language_model.layers.0"]
        in_order += ["language_model.layers.1", "language_model.norm", "proprio_projector", "policy.norm_in"]
        in_order += ["policy.fc_in", "policy.blocks.0", "policy.blocks.1", "policy.norm_out", "policy.fc_out"]
        with_next = {"language_model.embed_tokens": ["action_queries", "language_model.rotary_emb"]}
        with_next["policy.fc_in"] = ["policy.rotary"] if variant == "pro" else []
        for name in ("siglip", "language_model.embed_tokens", "language_model.layers.1", "policy.norm_in"):
            first, model = in_order.index(name), tiny_model(policy_variant=variant)
            for place, part in enumerate(in_order):
                hook = AlignDevicesHook("meta" if place >= first else "cpu", place_submodules=True)
                for one in (part, *with_next.get(part, ())):
                    add_hook_to_module(model.get_submodule(one), deepcopy(hook))
            inputs = tiny_inputs(model.config)
            with torch.no_grad(), one_device_per_operation():
                output = model(**inputs, actions=torch.zeros(2, 4, 7, device="meta"))
            assert output.actions.device.type == output.loss.device.type == "meta", name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_dtype_reaches_every_parameter(self, tmp_path, model, dtype):
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        inputs = tiny_inputs(loaded.config)
        del inputs["proprio"]
        assert loaded.predict_action(**inputs, state=torch.zeros(2, 8)).shape == (2, 4, 7)

    @pytest.mark.parametrize("rope_dtype", ["bfloat16", "float32"])
    def test_a_change_of_precision_and_back_spoils_no_rotary_table(self, rope_dtype):
        # The precision of the policy's tables is part of what the weights mean, see test_goldens.
        model = tiny_model(policy_rope_dtype=rope_dtype)
        expected = [table.clone() for table in model.policy.rotary()]
        model.half().bfloat16().float()
        assert all(map(torch.equal, model.policy.rotary(), expected))

    def test_a_new_policy_starts_from_pytorchs_initialisation(self, variant):
        torch.manual_seed(0)
        model = VLAAdapterForActionPrediction(tiny_config(policy_variant=variant))
        weight, bias = model.policy.fc_in.weight, model.policy.fc_in.bias  # 224 in, 32 out
        bound = 224**-0.5
        assert 0.95 * bound < weight.abs().max() <= bound and 0 < bias.abs().max() <= bound
        assert all(block.attention.gating_factor.item() == 0 for block in model.policy.blocks)
        assert model.action_queries.weight.std().item() == pytest.approx(0.02, rel=0.2)


class TestResizing:
    def test_token_embeddings_can_grow(self, model, inputs):
        with torch.no_grad():
            expected = model(**inputs).actions
            model.resize_token_embeddings(1100)
            assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 1100
            torch.testing.assert_close(model(**inputs).actions, expected, rtol=0, atol=1e-5)

    def test_a_resized_model_can_be_saved_and_loaded(self, tmp_path, model, inputs):
        model.resize_token_embeddings(1100)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).actions, model(**inputs).actions)

    def test_a_new_action_size_starts_the_ends_of_the_policy_anew(self, tmp_path, model):
        model.save_pretrained(tmp_path)
        changes = {"action_dim": 14, "norm_stats": norm_stats(action_dim=14)}
        with pytest.raises((ValueError, RuntimeError), match="mismatch"):
            AutoModel.from_pretrained(tmp_path, **changes)
        loaded = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes)
        inputs = tiny_inputs(loaded.config)
        assert loaded(**inputs).actions.shape == (2, 4, 14)
        assert torch.equal(loaded.policy.blocks[0].fc.weight, model.policy.blocks[0].fc.weight)
        assert torch.equal(loaded.vision_projector.fc1.weight, model.vision_projector.fc1.weight)
        bound = loaded.policy.latent_size**-0.5
        assert 0.9 * bound < loaded.policy.fc_in.weight.abs().max() <= bound
        assert torch.equal(loaded.policy.norm_in.weight, torch.ones(14 * 32))


class TestPeft:
    def test_lora_on_all_linear_layers_attaches_and_trains(self, model, inputs):
        peft = pytest.importorskip("peft")
        with torch.no_grad():
            expected = model(**inputs).actions
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        linear = [name for name, m in tiny_model(model.config).named_modules() if isinstance(m, torch.nn.Linear)]
        adapted_layers = [name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")]
        assert len(adapted_layers) == len(linear)
        with torch.no_grad():
            torch.testing.assert_close(adapted(**inputs).actions, expected)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            loss = adapted(**inputs, actions=torch.ones(2, 4, 7)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("saved", ["vision_projector", "proprio_projector", "policy", "action_queries"])
    def test_a_part_that_is_named_is_the_only_one_that_is_found(self, model, saved):
        # peft finds modules by the end of their name: `projector` alone would be two of them.
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r"language_model\..*q_proj", modules_to_save=[saved])
        adapted = peft.get_peft_model(model, config)
        found = [n for n, m in adapted.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
        assert found == [f"base_model.model.{saved}"]

    def test_an_adapter_can_be_saved_and_loaded(self, tmp_path, variant, inputs):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", modules_to_save=["action_queries"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(tiny_model(policy_variant=variant), config)
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny_model(policy_variant=variant), tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).actions, adapted(**inputs).actions)

    def test_a_merged_model_gives_the_adapted_actions(self, variant, inputs):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(tiny_model(policy_variant=variant), config)
        with torch.no_grad():
            expected = adapted(**inputs).actions
            merged = adapted.merge_and_unload()
            assert type(merged) is VLAAdapterForActionPrediction
            torch.testing.assert_close(merged(**inputs).actions, expected, rtol=0, atol=1e-4)


class TestCausalMasks:
    """Releases of transformers differ in what `create_causal_mask` takes; only what it requires is passed."""

    def test_arguments_that_a_release_does_not_have_are_not_passed(self):
        def without_past_key_values(config, inputs_embeds, attention_mask, position_ids=None):
            return (config, inputs_embeds, attention_mask)

        assert mask_maker(without_past_key_values)(config="c", inputs_embeds="e") == ("c", "e", None)

    def test_arguments_that_a_release_requires_are_none(self):
        def with_past_key_values(config, inputs_embeds, attention_mask, cache_position="unused", *, past_key_values):
            return (config, inputs_embeds, attention_mask, cache_position, past_key_values)

        assert mask_maker(with_past_key_values)(config="c", inputs_embeds="e") == ("c", "e", None, "unused", None)

    @pytest.mark.parametrize("layer_type", sorted(MASK_MAKERS))
    def test_the_installed_release_warns_of_nothing(self, layer_type):
        layers = {"layer_types": [layer_type] * 2, "use_sliding_window": True, "sliding_window": 4}
        model = tiny_model(text_config={**tiny_config().text_config.to_dict(), **layers})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = model(**tiny_inputs(model.config))
        assert torch.isfinite(output.actions).all()
