"""Training: the plan with its schedules, global updates and guard; the data it is given."""

from scvi_sams.train.data_splitter import DataPlacement, SAMSDataSplitter
from scvi_sams.train.streamed import StreamedCells
from scvi_sams.train.trainingplan import SAMSTrainingPlan

__all__ = ["DataPlacement", "SAMSDataSplitter", "SAMSTrainingPlan", "StreamedCells"]
