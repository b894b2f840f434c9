"""optim_args: typed, checked, early."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_gpt2
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import cpu
from transformers import GPT2LMHeadModel, TrainingArguments

from hf_mars import MarsAdamW, MarsShampoo, MarsTrainer, MarsTrainingArguments
from hf_mars.trainer import options
from hf_mars.trainer.names import OPTIM_ARGS, VARIANTS
from hf_mars.trainer.options import OPTIONS, hyperparameters, optimizer_cls_and_kwargs, options_of, parse_optim_args

ALL_NAMES = list(VARIANTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("  ", {}),
        ("gamma=0.05", {"gamma": 0.05}),
        (" gamma = 5e-2 , exact = TRUE ", {"gamma": 0.05, "exact": True}),
        ("max_norm=none,lr_1d=None", {"max_norm": None, "lr_1d": None}),
        ("max_norm=2", {"max_norm": 2.0}),
        ("exact=0,optimize_1d=yes", {"exact": False, "optimize_1d": True}),
        (
            "beta1=0.9,beta2=0,beta1_1d=0.8,beta2_1d=0.7",
            {"beta1": 0.9, "beta2": 0.0, "beta1_1d": 0.8, "beta2_1d": 0.7},
        ),
        ("foreach=none,fused=false", {"foreach": None, "fused": False}),
    ],
)
def test_values_are_typed(text, expected):
    parsed = parse_optim_args(text, "mars_adamw")
    assert parsed == expected
    assert [type(v) for v in parsed.values()] == [type(v) for v in expected.values()]


def test_shampoos_own_options():
    text = "ns_steps=3,adjust_lr_fn=match_rms_adamw,orthogonalize_embeddings=true"
    expected = {"ns_steps": 3, "adjust_lr_fn": "match_rms_adamw", "orthogonalize_embeddings": True}
    assert parse_optim_args(text, "mars_shampoo") == expected
    assert parse_optim_args("ns_steps=none", "mars_m") == {"ns_steps": None}


# text, what the message must hold
BAD = [
    ("gamm=1", ["'gamm'", "'1'", "'gamma'"]),
    ("gamma=abc", ["gamma", "'abc'", "[0, 1]"]),
    ("gamma=-1", ["gamma", "'-1'", "[0, 1]"]),
    ("gamma=nan", ["gamma", "'nan'"]),
    ("gamma=", ["gamma", "''"]),
    ("max_norm=0", ["max_norm", "'0'", "> 0", "none"]),
    ("max_norm=inf", ["max_norm", "'inf'"]),
    ("beta1=1", ["beta1", "[0, 1)"]),
    ("betas=(0.9,0.95)", ["'betas'", "write beta1=…,beta2=…"]),
    ("a=b=c", ["'a'", "'b=c'", "Valid: gamma"]),
    ("gamma=0.1 max_norm=1", ["gamma='0.1 max_norm=1'", "commas separate entries: gamma=0.1,max_norm=1"]),
    ("gamma=0.1;max_norm=1", ["commas separate entries: gamma=0.1,max_norm=1"]),
    ("gamm=0.1 max_norm=1", ["'gamm'", "commas separate entries: gamm=0.1,max_norm=1"]),
    ("gamma", ["'gamma'", "gamma=<"]),
    ("gamma=0.1,", ["gamma=0.1,", "empty"]),
    (",", ["empty"]),
    ("gamma=0.1,gamma=0.2", ["'gamma'", "twice"]),
    ("exact=maybe", ["exact", "'maybe'", "true or false"]),
    ("lr=1e-3", ["'lr'", "--learning_rate"]),
    ("weight_decay=0.1", ["--weight_decay"]),
    ("max_grad_norm=1", ["--max_grad_norm"]),
    ("adam_beta1=0.9", ["--adam_beta1"]),
    ("ns_steps=5", ["'ns_steps'", "not an option of mars_adamw; mars_shampoo and mars_m have it"]),
    ("Gamma=0.1", ["'Gamma'", "'gamma'"]),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text for text, _ in BAD])
def test_mistakes_are_named_when_arguments_are_made(text, words, tmp_path):
    with pytest.raises(ValueError, match="optim_args") as error:
        TrainingArguments(output_dir=str(tmp_path), optim="mars_adamw", optim_args=text)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("text", ["ns_steps=2.5", "ns_steps=0", "adjust_lr_fn=moonlight"])
def test_mistakes_in_shampoos_options(text):
    with pytest.raises(ValueError, match=text.split("=")[0]):
        parse_optim_args(text, "mars_shampoo")


def test_a_far_key_gets_no_guess():
    with pytest.raises(ValueError, match=r"not an option of mars_lion\. Valid: gamma") as error:
        parse_optim_args("momentum=0.9", "mars_lion")
    assert "nearest" not in str(error.value)
    with pytest.raises(ValueError, match="not an option of mars_lion; mars_adamw and mars_shampoo have it"):
        parse_optim_args("adjust_lr_fn=original", "mars_lion")


def test_mars_m_stands_for_its_scale():
    with pytest.raises(ValueError, match=r"match_rms_adamw.*mars_shampoo"):
        parse_optim_args("adjust_lr_fn=original", "mars_m")


def test_other_optimizers_are_left_alone(tmp_path):
    TrainingArguments(output_dir=str(tmp_path), optim="sgd", optim_args="momentum=0.9,anything=1")


def test_arguments_out_of_range_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate must be a number >= 0, got -1"):
        TrainingArguments(output_dir=str(tmp_path), optim="mars_lion", learning_rate=-1.0)


@given(st.sampled_from(ALL_NAMES), st.data())
def test_any_valid_entries_in_any_order_are_read_back(name, data):
    texts = {"gamma": st.floats(0, 1), "eps": st.floats(0, 1e3), "beta1": st.floats(0, 1, exclude_max=True)}
    texts["exact"] = st.booleans()
    chosen = data.draw(st.lists(st.sampled_from(sorted(texts)), unique=True))
    values = {key: data.draw(texts[key]) for key in chosen}
    text = ",".join(f"{key}={value}" for key, value in values.items())
    assert parse_optim_args(text, name) == values


@given(st.sampled_from(ALL_NAMES), st.text(alphabet="abgmx=_1.0, -eé", max_size=30))
def test_any_text_is_read_or_refused_with_a_value_error(name, text):
    try:
        parsed = parse_optim_args(text, name)
    except ValueError as error:
        assert "optim_args" in str(error)
    else:
        assert set(parsed) <= set(options_of(name))
        assert not any(isinstance(v, float) and not math.isfinite(v) for v in parsed.values())


@pytest.mark.parametrize(
    ("cls", "settings", "betas"),
    [
        (TrainingArguments, {}, (0.9, 0.99)),
        (TrainingArguments, {"adam_beta1": 0.8}, (0.8, 0.99)),
        (TrainingArguments, {"adam_beta2": 0.95}, (0.9, 0.95)),
        (TrainingArguments, {"adam_beta1": 0.8, "optim_args": "beta1=0.7"}, (0.7, 0.99)),
        (MarsTrainingArguments, {}, (0.9, 0.99)),
        (MarsTrainingArguments, {"adam_beta1": 0.9, "adam_beta2": 0.999}, (0.9, 0.999)),
        (MarsTrainingArguments, {"adam_beta1": 0.9, "optim_args": "beta2=0.5"}, (0.9, 0.5)),
    ],
)
def test_whose_betas_count(cls, settings, betas, tmp_path):
    assert hyperparameters(cls(output_dir=str(tmp_path), optim="mars_adamw", **settings))["betas"] == betas


def test_mars_training_arguments_defaults(tmp_path):
    args = MarsTrainingArguments(output_dir=str(tmp_path))
    assert (args.optim, args.adam_beta1, args.adam_beta2) == ("mars_adamw", 0.9, 0.99)
    baseline = MarsTrainingArguments(output_dir=str(tmp_path), optim="adamw_torch")
    stock = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch")
    assert (baseline.adam_beta1, baseline.adam_beta2) == (stock.adam_beta1, stock.adam_beta2)


def test_everything_reaches_the_optimizer(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        optim="mars_shampoo",
        learning_rate=0.02,
        adam_epsilon=1e-6,
        optim_args="gamma=0.05,max_norm=none,lr_1d=1e-3,beta1_1d=0.8,ns_steps=3",
    )
    assert hyperparameters(args) == {
        "lr": 0.02,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "gamma": 0.05,
        "max_norm": None,
        "lr_1d": 1e-3,
        "betas_1d": (0.8, 0.95),
        "ns_steps": 3,
    }


def test_shampoo_needs_the_model(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim="mars_m")
    with pytest.raises(ValueError, match="needs the model"):
        options.optimizer_cls_and_kwargs(args, None)
    assert options.optimizer_class("mars_m") is MarsShampoo


def test_the_trainer_says_where_it_is_missing(monkeypatch, caplog, tmp_path):
    """The compiled step of CPUs, as where the package was installed without a C compiler."""
    caplog.set_level("WARNING", "hf_mars")
    args = TrainingArguments(str(tmp_path), optim="mars_adamw", use_cpu=True)
    optimizer_cls_and_kwargs(args, None)
    assert "compiled step of hf_mars is missing" not in caplog.text
    monkeypatch.setattr(cpu, "_cpu", None)
    optimizer_cls_and_kwargs(args, None)
    assert "compiled step of hf_mars is missing" in caplog.text


def test_a_checkout_that_hides_the_installed_package_is_named(monkeypatch, caplog, tmp_path):
    """As after `pip install <clone>` and `python <clone>/run_clm.py`; no compiler is to blame there."""
    (tmp_path / "hf_mars").mkdir()
    monkeypatch.setattr(cpu, "_cpu", None)
    installed = SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(options, "distribution", lambda name: installed)
    optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim="mars_adamw", use_cpu=True), None)
    assert f"hides the installed {tmp_path / 'hf_mars'}" in caplog.text and "compiler" not in caplog.text


# ---- what would be silent ----


def test_all_weights_of_a_pretrained_model(tmp_path, caplog):
    """By orthogonalised updates: once, and not of new models or where some are frozen."""
    caplog.set_level("WARNING", "hf_mars")
    options.logger.warning_once.cache_clear()  # other tests of this process tune such models, too
    optimizer_name = "mars_m"

    def make(model):
        args = TrainingArguments(str(tmp_path), optim=optimizer_name, use_cpu=True)
        optimizer_cls_and_kwargs(args, model)
        return caplog.text.count("tunes all weights of a pretrained model")

    tiny_gpt2().save_pretrained(tmp_path / "model")
    assert make(tiny_gpt2()) == 0
    frozen = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    frozen.transformer.wte.requires_grad_(False)
    assert make(frozen) == 0
    optimizer_name = "mars_adamw"
    assert make(GPT2LMHeadModel.from_pretrained(tmp_path / "model")) == 0
    optimizer_name = "mars_m"
    assert [make(GPT2LMHeadModel.from_pretrained(tmp_path / "model")) for _ in range(2)] == [1, 1]


def test_options_may_be_a_mapping(tmp_path):
    """From Python, as axolotl's YAML has it too; transformers parses text."""
    options_given = {"gamma": 0.1, "max_norm": None, "optimize_1d": True}
    args = TrainingArguments(str(tmp_path), optim="mars_adamw", optim_args=options_given)
    assert args.optim_args == "gamma=0.1,max_norm=None,optimize_1d=True"
    kwargs = hyperparameters(args)
    assert (kwargs["gamma"], kwargs["max_norm"], kwargs["optimize_1d"]) == (0.1, None, True)
    with pytest.raises(ValueError, match=r"'gamm'.*nearest.*'gamma'"):
        TrainingArguments(str(tmp_path), optim="mars_adamw", optim_args={"gamm": 1})


@pytest.mark.parametrize("cls", [TrainingArguments, MarsTrainingArguments])
def test_a_name_that_is_none_has_a_nearest(cls, tmp_path):
    with pytest.raises(ValueError, match="optim='mars_adam': there is no such optimizer; the nearest is mars_adamw"):
        cls(str(tmp_path), optim="mars_adam")
    with pytest.raises(ValueError, match="optim='MARS_M': there is no such optimizer; the nearest is mars_m"):
        cls(str(tmp_path), optim="MARS_M")


def test_options_of_mars_beside_another_optimizer(tmp_path, caplog):
    """transformers drops them in silence."""
    with pytest.raises(ValueError, match=r"'gamma=0.1' is for MARS, and optim='adamw_torch' makes no use of it"):
        MarsTrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="gamma=0.1")
    TrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="gamma=0.1")
    assert caplog.text.count("'gamma=0.1' is for MARS") == 1
    for optim, theirs in (("lomo", "gamma=0.1"), ("adamw_torch", "momentum=0.1")):
        MarsTrainingArguments(str(tmp_path), optim=optim, optim_args=theirs)
    assert caplog.text.count("is for MARS") == 1


def test_an_optimizer_of_the_users_beside_exact_mode(tmp_path, caplog):
    model = torch.nn.Linear(2, 2)
    adamw = (torch.optim.AdamW(model.parameters()), None)
    args = MarsTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", optim_args="exact=true")
    with pytest.raises(ValueError, match=r"'exact=true' asks for exact mode, but .*AdamW.* leave out one"):
        MarsTrainer(model, args, optimizers=adamw)
    MarsTrainer(model, args, optimizers=(MarsAdamW(model.parameters(), exact=True), None))
    assert not caplog.text
    args = MarsTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", optim_args="gamma=0.1")
    MarsTrainer(model, args, optimizers=adamw)
    assert "optim_args='gamma=0.1' has no effect" in caplog.text


def test_the_list_of_options_that_imports_nothing_is_the_real_one():
    assert set(OPTIM_ARGS) == OPTIONS.keys()
