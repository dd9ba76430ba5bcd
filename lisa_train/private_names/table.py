"""Every private name that this package uses, by the part that needs it."""

from lisa_train.private_names.entry import PrivateName


def _trainer() -> list[PrivateName]:
    loop = [
        PrivateName(
            "exceptions", "transformers.trainer:Trainer", name,
            ("trainer/events",),
            "callbacks that were added by hand do not hear of every exception: LISA's flags and "
            f"the status of the run stay as they were then (attach hears of all){more}",
            refused=False,
        )
        for name, more in (
            ("_run_epoch", ""),
            ("_evaluate", ""),
            ("_finalize_training", "; with load_best_model_at_end the last census of a run is "
             "that of the best weights"),
        )
    ]  # fmt: skip
    pass_of = [
        PrivateName(
            "trainer probe", "transformers.trainer:Trainer", name,
            ("trainer/probe_pass",),
            "probe_every cannot make the pass that the trainer makes; leave it out",
        )
        for name in ("_get_num_items_in_batch", "_prepare_inputs")
    ]  # fmt: skip
    return [
        *loop,
        *pass_of,
        PrivateName(
            "trainer", "transformers.trainer", "_train_batch_size", ("trainer/continuation",),
            "run.json states the batch size of the settings where auto_find_batch_size chose "
            "another",
            refused=False, in_source=True,
        ),
        PrivateName(
            "trainer", "transformers.trainer_callback:TrainerState", "stateful_callbacks",
            ("trainer/lisa_callback", "trainer/continuation"),
            "a checkpoint cannot hold LISA's schedule", in_source=True,
        ),
        PrivateName(
            "trainer", "accelerate:Accelerator", "optimizer_step_was_skipped",
            ("trainer/loss_scale",), "steps that fp16 skips are recorded as made",
        ),
        PrivateName(
            "trainer", "accelerate.accelerator", "scaler", ("trainer/loss_scale",),
            "gradients under fp16 are recorded with the loss scale in them", in_source=True,
        ),
        PrivateName(
            "trl head", "trl.trainer.utils", "_ChunkedLogProbFunction", ("trainer/trl_head",),
            "the gradient of a head that trains stands whole in fp32: six bytes per weight of the "
            "head more memory than the tables say",
            refused=False, if_loaded=True,
        ),
    ]  # fmt: skip


def _checkpoints() -> list[PrivateName]:
    return [
        PrivateName(
            "sharded checkpoint",
            "transformers.trainer:Trainer",
            "_load_optimizer_and_scheduler",
            ("trainer/sharded_checkpoint",),
            "optimizer state of a model that FSDP2 splits is asked for of layers that rest, and "
            "a checkpoint cannot be resumed from",
        ),
        PrivateName(
            "best weights",
            "transformers.trainer:Trainer",
            "_load_best_model",
            ("trainer/renamed_weights",),
            "a model whose checkpoints bear other names ends with a mixture of the best weights "
            "and the last; leave load_best_model_at_end out",
        ),
    ]


def _models() -> list[PrivateName]:
    checkpointing = "backward runs down to the embeddings under gradient checkpointing, which costs"
    return [
        PrivateName(
            "model", "torch._dynamo.eval_frame:OptimizedModule", "_orig_mod",
            ("model/module_tree",), "the model below torch.compile is not found",
            in_source=True, if_loaded=True,
        ),
        PrivateName(
            "engine", "transformers.modeling_utils", "_require_grads_hooks",
            ("methods/lisa/input_gradients",), f"{checkpointing} the time that LISA saves there",
            refused=False, in_source=True, if_loaded=True,
        ),
        PrivateName(
            "engine", "transformers.modeling_utils", "_gradient_checkpointing_func",
            ("methods/lisa/input_gradients",),
            "the reentrant kind of gradient checkpointing is not told from the other and may "
            "train nothing",
            in_source=True, if_loaded=True,
        ),
        PrivateName(
            "model", "transformers.configuration_utils", "_name_or_path",
            ("measure/disk/manifest",), "run.json names the model by its class alone",
            refused=False, in_source=True, if_loaded=True,
        ),
        *(
            PrivateName(
                "schedulefree", "schedulefree.adamw_schedulefree", name,
                ("optim/schedule_free",),
                "layers that start late move about thirty times too far in their first step",
                in_source=True,
            )
            for name in ("weight_sum", "k", "z")
        ),
        PrivateName(
            "step in backward", "transformers.trainer_pt_utils", "optimizer_dict",
            ("optim/step_in_backward",),
            "optimizers that step inside backward themselves are not seen",
            refused=False, in_source=True, if_loaded=True,
        ),
        PrivateName(
            "step of copies", "torch.optim.optimizer", "hooked", ("optim/step_copies",),
            "all gradients are in fp32 at once in a step with lisa.precision 'fp32_active': two "
            "bytes more for every weight that trains",
            refused=False, in_source=True,
        ),
    ]  # fmt: skip


def _recorder() -> list[PrivateName]:
    recorder = [
        ("torch", "_foreach_norm", "model/norms", "norms cannot be taken"),
        ("torch", "_foreach_copy_", "model/joined", "norms of small tensors cannot be taken"),
        ("torch:Tensor", "_version", "measure/adapters/lora_pairs",
         "merged_norm stays that of an earlier weight"),
        ("torch:Tensor", "_make_subclass", "model/side_pass",
         "no measuring pass can be made"),
        ("torch.nn.modules.module", "_parameters", "model/side_pass",
         "no measuring pass can be made"),
        ("torch.nn.parallel:DistributedDataParallel", "_active_ddp_module", "model/sharding",
         "a measuring pass through DDP waits for gradients that never come"),
    ]  # fmt: skip
    fsdp = "torch.distributed.fsdp._fully_shard"
    sharded = [
        ("sharded", f"{fsdp}:FSDPModule", "_get_fsdp_state", "model/sharding",
         "weights that FSDP2 has gathered are taken for plain ones"),
        ("sharded probe", f"{fsdp}._fsdp_state", "_fsdp_param_groups", "model/sharding",
         "a measuring pass leaves out what rests, or waits for ever"),
        ("sharded probe", f"{fsdp}._fsdp_param_group:FSDPParamGroup", "_init_mp_dtypes",
         "model/sharding",
         "a measuring pass leaves out what rests"),
        ("sharded probe", f"{fsdp}._fsdp_param_group", "reduce_scatter_unused_params",
         "model/sharding",
         "processes that reach other tensors wait for each other for ever"),
    ]  # fmt: skip
    in_source = {
        "_parameters", "_fsdp_param_groups", "reduce_scatter_unused_params",
    }  # fmt: skip
    return [
        *(
            PrivateName("recorder", owner, name, (user,), without, in_source=name in in_source)
            for owner, name, user, without in recorder
        ),
        *(
            PrivateName(area, owner, name, (user,), without, in_source=name in in_source)
            for area, owner, name, user, without in sharded
        ),
        *_adapters(),
        *_base_weights(),
    ]


def _adapters() -> list[PrivateName]:
    lora = "the products of the adapters are not found, and delta_norm and merged_norm are missing"
    names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "scaling",
             "get_base_layer", "fan_in_fan_out", "parameter_name", "num_experts")  # fmt: skip
    return [
        PrivateName(
            "adapters", "peft.tuners.lora.layer", name, ("measure/adapters/search",), lora,
            in_source=True,
        )
        for name in names
    ]  # fmt: skip


def _base_weights() -> list[PrivateName]:
    without = "base_delta cannot tell which tensors of the checkpoint make up which weight"
    loading = "transformers.core_model_loading"
    files = "base_delta asks the hub for files that are not in the cache"
    return [
        *(
            PrivateName(
                "base_delta", loading, name, ("measure/step/checkpoint_conversions",), without,
            )
            for name in (
                "WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key",
            )
        ),
        PrivateName(
            "base_delta", loading, "_weight_conversions", ("measure/step/checkpoint_conversions",),
            without, in_source=True,
        ),
        PrivateName(
            "base_delta", "transformers.conversion_mapping", "get_model_conversion_mapping",
            ("measure/step/checkpoint_conversions",), without,
        ),
        *(
            PrivateName(
                "base_delta", "transformers.utils.hub", name, ("measure/step/base_weights",), files,
                in_source=True,
            )
            for name in (
                "_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors",
            )
        ),
    ]  # fmt: skip


def _eight_bit() -> list[PrivateName]:
    optimizer = "bitsandbytes.optim.optimizer"
    without = "the precision of the optimizer's state cannot be chosen by group"
    return [
        PrivateName("eight bit", optimizer, "Optimizer8bit", ("optim/eight_bit",), without),
        *(
            PrivateName(
                "eight bit", f"{optimizer}:GlobalOptimManager", n, ("optim/eight_bit",), without
            )
            for n in ("initialize", "override_config")
        ),
        PrivateName("eight bit", optimizer, "mng", ("optim/eight_bit",), without, in_source=True),
        PrivateName(
            "bitsandbytes",
            f"{optimizer}:Optimizer8bit",
            "check_overrides",
            ("optim/step_in_backward",),
            "settings of single tensors are lost where the optimizer steps inside backward",
        ),
    ]


def _estimate() -> list[PrivateName]:
    names = [
        ("trl.kernels.chunked_logprob", "_forward_tile", "estimate/kernels"),
        ("trl.kernels.chunked_logprob", "_backward_tile", "estimate/kernels"),
        ("trl.kernels.chunked_logprob", "_addmm_fp32", "estimate/kernels"),
        ("trl.trainer.utils", "add_fused_lm_head", "estimate/stage"),
        ("transformers.masking_utils", "find_packed_sequence_indices", "estimate/kernels"),
        ("transformers.modeling_utils:PreTrainedModel", "_from_config", "estimate/stage"),
        ("torch._C", "_current_graph_task_id", "estimate/step"),
        ("torch._subclasses.fake_tensor", "FakeTensorMode", "estimate/stage"),
        ("torch._subclasses.fake_tensor", "DataDependentOutputException", "estimate/step"),
        ("torch._subclasses.fake_tensor", "DynamicOutputShapeException", "estimate/step"),
        ("torch._subclasses.fake_tensor", "UnsupportedOperatorException", "estimate/step"),
        ("torch.utils._python_dispatch", "TorchDispatchMode", "estimate/trace"),
        ("torch.utils._pytree", "tree_leaves", "estimate/trace"),
        ("torch:UntypedStorage", "_cdata", "estimate/trace"),
        ("torch.nn.modules.module", "_buffers", "estimate/stage"),
    ]
    return [
        PrivateName(
            "estimate trl" if owner.startswith("trl") else "estimate", owner, name, (user,),
            "the memory of a step cannot be estimated", in_source=name == "_buffers",
        )
        for owner, name, user in names
    ]  # fmt: skip


def _demo() -> list[PrivateName]:
    return [
        PrivateName(
            "demo", "torch.cpu", "_is_avx512_bf16_supported", ("command/demo/__main__",),
            "the demo does not know whether this processor computes in bf16",
        )
    ]  # fmt: skip


TABLE: tuple[PrivateName, ...] = (
    *_trainer(), *_checkpoints(), *_models(), *_recorder(), *_eight_bit(), *_estimate(), *_demo(),
)  # fmt: skip
