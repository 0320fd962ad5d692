"""What is trained for one task, and how one task or many answer: lanes over one pass of the trunk."""

from .answering import answer_all as answer_all
from .answering import answer_each as answer_each
from .arrangement import Arrangement as Arrangement
from .arrangement import head_lane_of as head_lane_of
from .arrangement import lane_of as lane_of
from .checks import check_images as check_images
from .checks import check_label_names as check_label_names
from .checks import check_label_range as check_label_range
from .checks import check_labels as check_labels
from .checks import check_task_names as check_task_names
from .heads import RandomFeatureHead as RandomFeatureHead
from .heads import RandomFeatures as RandomFeatures
from .lanes import AdaptedLane as AdaptedLane
from .lanes import Batch as Batch
from .lanes import HeadLane as HeadLane
from .lanes import Lane as Lane
from .lanes import MaskedLane as MaskedLane
from .lanes import outside_graphs as outside_graphs
from .merging import as_classifier as as_classifier
from .merging import head_width as head_width
from .merging import merge as merge
from .merging import no_head_message as no_head_message
from .merging import pad_head as pad_head
from .plan import Plan as Plan
from .plan import make_plan as make_plan
from .task import Task as Task
