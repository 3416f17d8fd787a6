import pytest

REFUSED = {
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "enable_lora": [True, False, True],
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [5],
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 32},
    "bias": "some",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_its_key(saved, key):
    saved.edit(**{key: REFUSED[key]})
    assert f"{key} = {REFUSED[key]!r} is not supported" in saved.refusal()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_took_from_the_base_is_refused(saved, start):
    saved.edit(init_lora_weights=start)
    assert f"init_lora_weights = '{start}' is not supported: it is for a base" in saved.refusal()


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica", None])
def test_a_start_that_left_the_base_alone_is_read(saved, start):
    saved.edit(init_lora_weights=start)
    assert saved.load()


def test_everything_amiss_is_told_at_once(saved):
    saved.edit(use_qalora=True, layer_replication=[[0, 1]], r="3", target_modules=7)
    message = saved.refusal()
    assert all(key in message for key in ("use_qalora", "layer_replication", "r is '3'"))
    assert "target_modules = 7 is neither a list of names nor a pattern" in message


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", "PREFIX_TUNING", "VERA", None])
def test_another_kind_of_adapter_is_refused(saved, kind):
    saved.edit(peft_type=kind)
    assert f"peft_type {kind!r} is not supported (LORA, IA3 are)" in saved.refusal()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": None}, "r is None, not a number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"alpha_pattern": {"q_proj": True}}, "q_proj is True, not a number"),
        ({"r": 10**400}, "not a number"),
        ({"use_rslora": "false"}, "use_rslora = 'false' is neither true nor false"),
        ({"use_dora": 0, "lora_bias": 1}, "use_dora = 0 is neither"),
        ({"ensure_weight_tying": "no"}, "ensure_weight_tying = 'no' is neither"),
        ({"rank_pattern": {str(n): 1 for n in range(10_001)}}, "rank_pattern has 10001 entries"),
        ({"modules_to_save": ["a"] * 10_001}, "modules_to_save has 10001 entries; at most 10000"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern = ['q_proj'] is not a table of numbers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head' is not a list of names"),
        ({"layers_to_transform": "all"}, "layers_to_transform = 'all' is not a list of numbers"),
        ({"exclude_modules": [1]}, "exclude_modules = [1] is neither a list of names nor a"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "layers_to_transform needs target_modules to be a list of names",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(saved, settings, message):
    saved.edit(**settings)
    assert message in saved.refusal()


def test_a_key_that_nobody_knows_is_refused_unless_it_is_empty(saved):
    saved.edit(use_newer_lora={"theta": 2})
    assert "use_newer_lora = {'theta': 2} is not known here; if it does not" in saved.refusal()
    saved.edit(use_newer_lora=None, use_newest_lora=False)
    assert saved.load()


def test_keys_of_older_versions_and_of_other_trainers_change_nothing(saved, equal):
    before = saved.load()
    saved.edit(
        merge_weights=False,
        enable_lora=None,
        fan_in_fan_out=True,
        loftq_config={},
        megatron_core="megatron.core",
        qalora_group_size=16,
        runtime_config={"ephemeral_gpu_offload": False},
        unsloth_fixed=True,
    )
    assert equal(saved.load(), before)
