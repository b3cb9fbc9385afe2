"""The words of a bake-off's pages in English and Chinese. Words that have no translation stay in English."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["en", "zh"]

CHINESE = {
    # the report
    "Bake-off": "模型对比",
    "{prompts} prompts x {models} models x {seeds} seeds": "{prompts} 条提示词 × {models} 个模型 × {seeds} 个种子",
    "At a glance": "概览",
    "Model": "模型",
    "Pictures": "图片",
    "Measure": "指标",
    "all": "全部",
    "All right": "全部正确",
    "Text exact": "文字准确",
    "Seconds": "秒 / 张",
    "Peak memory": "内存峰值",
    "Energy": "能耗",
    "Cost": "费用",
    "Failed": "失败",
    "not told": "未知",
    "not asked": "未要求",
    "{count} of {total}": "{total} 张中 {count} 张",
    "right": "正确",
    "wrong": "错误",
    "not checked": "未检查",
    "not drawn": "未完成",
    "What the numbers mean": "数字说明",
    "Ranking by {votes} votes of people": "人工投票排名（{votes} 票）",
    "Ranking by {votes} answers of a judge": "评审模型排名（{votes} 票）",
    "Rank": "名次",
    "Points": "得分",
    "Votes": "票数",
    "Both bad": "两张都差",
    "P(row is better than column)": "行优于列的概率",
    "Voters": "投票人",
    "left wins": "左侧胜出",
    "agreement (Krippendorff's alpha)": "一致性（Krippendorff α）",
    "inconsistent answers": "前后矛盾的回答",
    "share of ties between equal models": "实力相当时的平局比例",
    "All measures": "全部指标",
    "Prompts and pictures": "提示词与图片",
    "{shown} of {total} prompts are shown here; the contact sheets have all.": (
        "此处显示 {total} 条提示词中的 {shown} 条；联系表包含全部图片。"
    ),
    "Models and settings": "模型与设置",
    "Files": "文件",
    "Contact sheets": "联系表",
    "close": "关闭",
    "Machine": "机器",
    "weights": "权重",
    "licence": "许可证",
    "quant": "量化",
    "device": "设备",
    "dtype": "精度",
    "steps": "步数",
    "evaluations": "模型评估次数",
    "guidance": "引导系数",
    "solver": "求解器",
    "size": "尺寸",
    "where": "位置",
    "options": "选项",
    "here": "本机",
    "a server": "服务器",
    "a provider": "服务商",
    "Shares have 95 % intervals by Wilson.": "比例附 Wilson 95% 置信区间。",
    "Means have 95 % intervals by resampling whole prompts: pictures of one prompt depend on each other.": (
        "均值的 95% 区间通过对整条提示词重抽样得到：同一提示词的图片并不独立。"
    ),
    "Seconds are from the request to the picture. The first picture after a model is loaded does not count.": (
        "耗时从提交请求到出图为止；模型加载后的第一张不计入。"
    ),
    "Memory is that of the GPU, or of the whole process on a CPU.": "内存指显存，在 CPU 上指整个进程。",
    "Energy is that of the GPU and of whole processors, where they tell it.": "能耗取自 GPU 和处理器的计数器（若有）。",
    "The cost is a provider's price, or electricity.": "费用为服务商价格或电费。",
    "Models whose intervals overlap share a rank. 400 points more are odds of ten to one.": (
        "区间重叠的模型名次并列。相差 400 分相当于胜算十比一。"
    ),
    # measures
    "seconds": "耗时（秒）",
    "seconds, median": "耗时中位数（秒）",
    "peak memory in bytes": "内存峰值（字节）",
    "energy in joules": "能耗（焦耳）",
    "cost in US dollars": "费用（美元）",
    "failed": "失败",
    "failed: nan": "失败：数值溢出",
    "failed: blank": "失败：纯色图",
    "failed: refusal": "失败：被拒绝",
    "failed: error": "失败：错误",
    "all right": "全部正确",
    "text exact, by rapidocr": "文字准确（rapidocr）",
    "likeness of text (NED), by rapidocr": "文字相似度 NED（rapidocr）",
    "wrong characters, by rapidocr": "错字率（rapidocr）",
    "colours right": "颜色正确",
    "things right": "物体数量与关系正确",
    "object and colour": "物体与颜色",
    "objects": "物体",
    "colours": "颜色",
    "background": "背景",
    "places": "位置",
    "relation": "关系",
    "count": "数量",
    "text exact": "文字准确",
    "characters right": "字符正确",
    "likeness of text (NED)": "文字相似度 NED",
    "sharpness": "清晰度",
    "clipped to black": "死黑像素",
    "clipped to white": "过曝像素",
    "with lines across": "有贯穿线",
    "diversity over seeds": "种子间多样性",
    "duplicates among seeds": "种子间重复",
    # the voting page
    "Which picture is better?": "哪张图片更好？",
    "Both pictures were drawn from the same prompt. Who drew them is hidden.": "两张图片出自同一条提示词，作者已隐藏。",
    "Your name": "您的名字",
    "Begin": "开始",
    "Left": "左边",
    "Right": "右边",
    "Tie": "平局",
    "Upper": "上边",
    "Lower": "下边",
    "First picture": "第一张图",
    "Second picture": "第二张图",
    "Undo": "撤销",
    "Download votes": "下载投票",
    "Copy votes": "复制投票",
    "Copied.": "已复制。",
    "Votes are saved.": "投票已保存。",
    "Votes stay in this browser until you download them.": "投票保存在此浏览器中，直到您下载。",
    "The votes cannot be saved: download them.": "无法保存投票：请下载。",
    "Votes: {count}": "{count} 票",
    "The picture cannot be shown.": "无法显示图片。",
}
"""English words -> Chinese. {names} are filled in."""
FILLED = re.compile(r"\{(\w+)\}")


def words(language: Language, text: str, **values: object) -> str:
    """A text in a language, with its values filled in."""
    told = CHINESE.get(text, text) if language == "zh" else text
    return FILLED.sub(lambda found: str(values[found[1]]), told) if values else told
