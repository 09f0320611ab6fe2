"""The sections of project.yaml, with their defaults; `slm.settings` loads and merges them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of project.yaml: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Project(Section):
    """Who owns the project; `repository` is the address that Colab installs from."""

    name: str = "model-project"
    description: str = ""
    author: str = ""
    license: str = "Apache-2.0"
    repository: str = ""


class Task(Section):
    """The answers that decide whether a fine-tune is right (01), and the targets it must meet."""

    domain: str = "support"
    high_stakes: bool = False
    expert_review: str = ""  # name of the reviewing expert; required when high_stakes
    changes_often: bool = False
    needs_knowledge: bool = False
    must_cite: bool = False  # answers cite or look up documents that change
    private_corpus: bool = False  # the task rests on a large private corpus
    flexible_style: bool = False
    teacher_is_good: bool = False
    preference_data: bool = False
    requests_per_month: int = 1_000_000
    target_latency_ms: float = 2000.0
    target_cost_per_1k: float = 0.10  # in `cost.currency`


class Endpoint(Section):
    """An OpenAI-compatible endpoint. The key comes from the environment variable `api_key_env`, never from a file."""

    url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(8, ge=1, le=256)
    timeout_s: float = 60.0
    retries: int = Field(4, ge=0, le=10)
    requests_per_minute: int = Field(0, ge=0)  # 0: no limit but the endpoint's own
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # some models take only the second
    usd_per_1m_input: float = 0.0
    usd_per_1m_output: float = 0.0


class Model(Section):
    """The student. `base`: "embedded", "tiny", a Hub id or a folder; `larger`: what it is compared with, if anything."""

    base: str = "embedded"
    license: str = "apache-2.0"
    revision: str = ""
    larger_gguf: str = ""
    larger: Endpoint = Endpoint()


class Generate(Section):
    """Teacher rows (03)."""

    teacher: Literal["recorded", "openai", "gguf"] = "recorded"
    endpoint: Endpoint = Endpoint()
    endpoints: list[Endpoint] = []  # more teachers: calls are dealt out among all, so that they can be compared
    gguf: str = ""  # path of the local teacher's file
    context: int = Field(4096, ge=512)  # of the local teacher, in tokens
    languages: dict[str, float] = {}  # language code -> share; empty: the shares among the seed rows
    feasible_at: float | None = Field(None, ge=0, le=1)  # least dev score of a teacher; none: the contract's target
    rows_target: int = Field(600, ge=1)
    batch_rows: int = Field(20, ge=1, le=200)
    budget_usd: float = Field(5.0, ge=0)
    temperature: float = Field(0.9, ge=0, le=2)
    tokens_per_row: int = Field(300, ge=16)  # room for one row in a teacher's reply; sets max_tokens and the worst case
    limit: int = Field(0, ge=0)  # stop after this many rows; 0 = no limit


class Curate(Section):
    """Gates, split and seeds (04)."""

    near_duplicate: float = Field(0.6, gt=0, le=1)  # Jaccard similarity of word 3-shingles
    semantic_duplicate: float = Field(0.85, gt=0, le=1)  # TF-IDF cosine similarity
    leakage: float = Field(0.6, gt=0, le=1)  # Jaccard against evaluation rows
    contradiction: float = Field(0.8, gt=0, le=1)
    min_words: int = Field(2, ge=0)
    max_tokens: int = Field(512, ge=8)  # rendered row, in the student's tokens
    small_dataset: int = Field(1000, ge=0)  # below this the split is 70/15/15, from it on 80/10/10
    split_by: Literal["group", "cluster"] = "group"  # cluster: whole clusters of like messages on one side
    seed: int = 0
    include_seed_rows: bool = True
    embedder: str = ""  # a model2vec model (folder or Hub id) for likeness of meaning; "": TF-IDF, on small sets
    embedding_duplicate: float = Field(0.9, gt=0, le=1)  # cosine similarity of its vectors
    workers: int = Field(0, ge=0)  # processes; 0: one per core
    ray: str = ""  # "": this machine; "auto" or an address: a Ray cluster
    # Optional gates and the review queue; nothing here is on by default but the queue.
    patterns: dict[str, str] = {}  # output field (or "answer", the whole text) -> regex that it must match in full
    judge: Endpoint = Endpoint()  # on as soon as url and model are set
    judge_budget_usd: float = Field(2.0, ge=0)
    judge_min_rows: int = Field(30, ge=2)  # rows that people decided too, before the judge's word counts
    judge_min_kappa: float = Field(0.6, ge=-1, le=1)  # Cohen's kappa against those people
    review_fields: list[str] = []  # rows to look at: a label, "field" (where it is filled) or "field=value"
    expert_fields: dict[str, list[str]] = {}  # the same names -> who may sign: reviewers' names, or their roles
    review_sample: int = Field(40, ge=0)  # rows drawn at random into the queue, so that kappa is measured fairly
    review_most: int = Field(50, ge=1)  # rows queued for each reason at most
    cluster_share: float = Field(0.3, gt=0, le=1)  # a cluster with more of the rows than this is warned of
    # Rows refused for where they come from: a value, or key=value, of `source` or of the provenance (license, teacher,
    # imported, consent, …). A production row whose provenance says nothing of consent counts as consent=false.
    restricted_sources: list[str] = ["consent=false"]
    privacy: Literal["patterns", "presidio"] = "patterns"  # presidio: names and numbers by a language model too
    spacy_models: dict[str, str] = {"en": "en_core_web_sm"}  # language -> installed spaCy model, for presidio


class Train(Section):
    """The recipe, under the names of training/configs/train_config.yaml, which fills it first."""

    method: Literal["lora", "qlora", "full"] = "qlora"
    trainer: Literal["trl", "unsloth"] = "trl"
    dataset: str = ""  # a version of registry/datasets.jsonl, by its first digits; "": the rows in data/accepted
    max_seq_length: int = Field(2048, ge=16)
    load_in_4bit: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    lora_layers: int = Field(0, ge=0)  # adapters on the upper n layers only; 0 or more than there are: on all
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    learning_rate: float = Field(2e-4, gt=0)
    batch_size_per_device: int = Field(2, ge=1)
    gradient_accumulation_steps: int = Field(8, ge=1)
    epochs: float = Field(2.0, gt=0)
    max_steps: int = -1
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    lr_scheduler: str = "cosine"
    optimizer: str = "paged_adamw_8bit"
    packing: bool = True
    group_by_length: bool = True
    gradient_checkpointing: bool = True
    eval_steps: int = Field(100, ge=1)
    save_steps: int = Field(100, ge=1)
    early_stopping: bool = True
    early_stopping_metric: Literal["loss", "task"] = "loss"  # of dev_internal; task: what the model really answers
    seed: int = 0


class Preference(Section):
    """Preference tuning after SFT (05), on what the run's adapter gets wrong; kept only where dev shows it better."""

    method: Literal["", "dpo", "orpo", "grpo"] = ""  # "": none
    learning_rate: float | None = Field(None, gt=0)  # none: a twentieth of train.learning_rate
    beta: float = Field(0.1, ge=0)  # dpo and grpo: how tightly it holds to the SFT model; orpo: weight of the odds ratio
    epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    limit: int = Field(0, ge=0)  # rows that are asked for failures; 0 = all
    generations: int = Field(8, ge=2)  # grpo: answers per row
    temperature: float = Field(1.0, gt=0)  # grpo: of those answers
    # Weights of grpo's rewards; one that is not named counts nothing. "fields" is dealt out among the output's fields.
    rewards: dict[Literal["parses", "schema", "fields", "metric", "length"], Annotated[float, Field(ge=0)]] = {
        "parses": 0.5, "schema": 0.5, "fields": 2.0, "metric": 1.0, "length": 0.25,
    }  # fmt: skip


class Evaluate(Section):
    """Scoring (02, 06)."""

    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(16, ge=1)
    context: int = Field(2048, ge=128)
    fewshot: int = Field(4, ge=0, le=32)
    limit: int = Field(0, ge=0)  # rows per set; 0 = all
    confidence: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(2000, ge=100)
    final_test: bool = False  # look at test.jsonl, once, when dev and golden are settled
    latency_requests: int = Field(8, ge=1)  # lone, uncached requests that are timed per model
    slots: int = Field(16, ge=1)  # sequences that llama.cpp decodes together
    constrained: bool = True  # the prompted base and the fine-tuned model also with decoding held to the schema
    retrieve: int = Field(3, ge=1)  # passages of data/raw in the prompt of the RAG baseline (task.needs_knowledge)
    judge: Endpoint = Endpoint()  # for rubric scores and pairwise preference; on as soon as url and model are set


class Gates(Section):
    """Thresholds of the release gates (06); the contract's target and the task's limits are gates too."""

    schema_validity: float = Field(0.99, ge=0, le=1)
    critical_failures: int = Field(0, ge=0)  # golden rows with a critical field wrong
    tool_name_accuracy: float = Field(0.98, ge=0, le=1)
    required_argument_accuracy: float = Field(0.95, ge=0, le=1)
    json_parse_rate: float = Field(0.995, ge=0, le=1)
    unsafe_tool_call_rate: float = Field(0.0, ge=0, le=1)
    record_parse_rate: float = Field(0.995, ge=0, le=1)
    critical_field_accuracy: float = Field(0.98, ge=0, le=1)
    false_positive_rate: float = Field(0.05, ge=0, le=1)  # most of the null-label rows that may be acted on
    false_negative_rate: float = Field(0.05, ge=0, le=1)  # most of the other rows that may be passed over
    calibration_error: float = Field(0.1, ge=0, le=1)  # expected calibration error (ECE) of the label


class Divergence(Section):
    """How far next-token distributions may lie from the merged model's: mean Kullback-Leibler divergence in nats."""

    # Rounding to bfloat16 alone made up to 1e-3 with the embedded model, a merge into 4-bit weights 0.06.
    merged: float = 3e-3  # of the adapter over its base
    f16: float = 3e-3
    q8_0: float = 0.01
    q5_k_m: float = 0.05
    q4_k_m: float = 0.1


class Export(Section):
    """Merge, convert, quantize, prove (08)."""

    quants: list[Literal["f16", "q8_0", "q5_k_m", "q4_k_m"]] = Field(["f16", "q8_0", "q5_k_m", "q4_k_m"], min_length=1)
    converter: Literal["llama_cpp", "unsloth"] = "llama_cpp"  # who makes the f16 file; unsloth: from a LoRA adapter
    imatrix: bool = False  # quantize by how much training rows use each weight: nearer next tokens, same size
    tolerance: float = Field(0.025, ge=0, le=1)  # share of golden and dev rows (one at least) that a file may lose
    margin: float = Field(0.1, ge=0, le=1)  # how far below the adapter the interval of the difference may reach
    logit_prompts: int = Field(32, ge=1)  # golden rows whose next tokens are compared
    kl: Divergence = Divergence()
    context: int = Field(2048, ge=128)
    temperature: float = 0.0
    top_p: float = 1.0
    repeat_penalty: float = 1.05


class Repair(Section):
    """Targeted rows per failure cluster (07); the least and the most are the workflow's 20 and 100."""

    rows_per_cluster_min: int = Field(20, ge=1)
    rows_per_cluster_max: int = Field(100, ge=1)
    clusters_max: int = Field(5, ge=1)  # the largest clusters are repaired first; the others wait for the next run
    judge: Endpoint = Endpoint()  # names clusters, causes and situations in 07; on as soon as url and model are set
    proven: bool = True  # a round is kept only where dev shows it better; false: any gain on dev, golden being stable
    plan: str = ""  # path of a repair_plan.json: 03 then asks the teacher for its rows instead of the grid's


class Canary(Section):
    """The plan of a canary: who gets the candidate, and when it is decided. A customer is a `group` of the log."""

    share: float = Field(0.1, gt=0, lt=1)  # of the customers
    margin: float = Field(0.05, gt=0, lt=1)  # promoted when no failure rate can have risen by as much
    days: float = Field(1.0, ge=0)  # promoted after so many at the earliest
    settle_hours: float = Field(24.0, ge=0)  # people's corrections may take as long; younger requests wait for them
    most: int = Field(5000, ge=1)  # customers of the candidate; then, and after `days`, it ends undecided


class Production(Section):
    """Logs of the released model (flywheel): evaluation first, training second."""

    logs: str = "data/raw/production_logs.sample.jsonl"
    scrub: Literal["auto", "patterns", "presidio"] = "auto"  # auto: names too, by presidio, where that is installed
    random_share: float = Field(0.1, ge=0, le=1)  # of the unremarkable requests, for a person to look at
    holdout_first: int = Field(8, ge=0)  # corrected failures that the holdout gets before training gets any
    eval_share: float = Field(0.5, gt=0, le=1)  # of the groups after that; the rest are training candidates
    low_confidence: float = Field(0.5, ge=0, le=1)  # requests that the log says were answered less surely: to review
    review_most: int = Field(20, ge=0)  # requests of low confidence, and as many of each kind of drift, to review at once
    # The monitor: windows of so many days; the newest may be this much worse than the model's first, as a share.
    window_days: int = Field(7, ge=1)
    tolerance: float = Field(0.5, ge=0)
    drift: float = Field(0.2, ge=0, le=1)  # distance of length, language, topic or categories from the reference
    reference: Literal["training rows", "first window"] = "training rows"  # what drift is measured against
    endpoint: Endpoint = Endpoint()  # where the released model is hosted by the token: its prices, for ledger and monitor
    seed: int = 0
    router: str = "client/router.json"  # what `canary` writes and the client reads
    canary: Canary = Canary()


class Cost(Section):
    """Rates for the ledger and the cost model; money in `currency`."""

    currency: str = "USD"
    gpu_hourly_rate: float = Field(0.0, ge=0)  # of one card, or of the machine that trains and evaluates
    serving_hourly_rate: float | None = Field(None, ge=0)  # of the machine that answers; 0: nothing more; None: not said
    hosting_per_month: float = Field(0.0, ge=0)
    maintenance_per_month: float | None = Field(None, ge=0)  # data, retraining, on-call; 0: nothing; None: not said
    larger_price_per_1m_tokens: float = Field(0.0, ge=0)  # of the hosted model that the fine-tune would replace
    engineering_hourly_rate: float = Field(0.0, ge=0)
    review_hourly_rate: float = Field(0.0, ge=0)  # of the people who decide rows in 04
    unlocks: str = ""  # behaviour that prompting cannot give: the recorded reason to ship what saves no money
