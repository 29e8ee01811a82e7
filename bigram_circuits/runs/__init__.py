"""Runs as folders and as values.

What their files hold is in `contents.py`, a folder being written in `folder.py`, a finished run in `run.py`, and what
its records warn of in `ending.py`.
"""

from bigram_circuits.runs.contents import (
    Checkpoint as Checkpoint,
)
from bigram_circuits.runs.contents import (
    CorpusIdentity as CorpusIdentity,
)
from bigram_circuits.runs.contents import (
    InputCheck as InputCheck,
)
from bigram_circuits.runs.contents import (
    ModelIdentity as ModelIdentity,
)
from bigram_circuits.runs.contents import (
    Outcome as Outcome,
)
from bigram_circuits.runs.contents import (
    PolishRecord as PolishRecord,
)
from bigram_circuits.runs.contents import (
    Rollback as Rollback,
)
from bigram_circuits.runs.contents import (
    RunSettings as RunSettings,
)
from bigram_circuits.runs.contents import (
    StepRecord as StepRecord,
)
from bigram_circuits.runs.contents import (
    TargetIdentity as TargetIdentity,
)
from bigram_circuits.runs.contents import (
    versions as versions,
)
from bigram_circuits.runs.ending import (
    cautions as cautions,
)
from bigram_circuits.runs.ending import (
    too_short as too_short,
)
from bigram_circuits.runs.ending import (
    why_stopped as why_stopped,
)
from bigram_circuits.runs.folder import RunFolder as RunFolder
from bigram_circuits.runs.run import (
    ATLAS as ATLAS,
)
from bigram_circuits.runs.run import (
    LEFT_OUT as LEFT_OUT,
)
from bigram_circuits.runs.run import (
    Run as Run,
)
from bigram_circuits.runs.run import (
    copy_run as copy_run,
)
from bigram_circuits.runs.run import (
    load_run as load_run,
)
from bigram_circuits.runs.run import (
    run_id as run_id,
)
