"""Every sentence of the page, in English and Chinese."""

from __future__ import annotations

CATALOGUE: dict[str, dict[str, str]] = {
    "en": {
        "hint_blind": "Two models, names hidden. Ask, read, vote; the names appear after the vote.",
        "hint_named": "Ask once, read every answer, vote for the better one.",
        "prompt": "Ask them something…",
        "ask": "Ask",
        "stop": "Stop",
        "again": "Regenerate",
        "new": "New",
        "better_a": "A is better",
        "better_b": "B is better",
        "best_a": "A is best",
        "best_b": "B is best",
        "best_c": "C is best",
        "best_d": "D is best",
        "tie": "Tie",
        "bad": "Both are bad",
        "bad_all": "All are bad",
        "settings": "Sampling",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the likeliest token",
        "top_p": "Top-p",
        "top_p_info": "keeps the likeliest tokens of this much probability",
        "max_new_tokens": "Length",
        "max_new_tokens_info": "most tokens an answer may have",
        "seed": "Seed",
        "seed_info": "empty: a new one every time",
        "system": "System prompt",
        "system_info": "takes effect with the next new conversation",
        "waiting": "Answering…",
        "ready": "Which answer is better?",
        "start": "",
        "incomplete": "An answer failed. Regenerate, or start a new conversation.",
        "pane_failed": "⚠ This model could not answer.",
        "saved": "Vote saved: {choice}",
        "saved_talk": "Vote saved: {choice}. It covers several turns, so it counts but does not train.",
        "pace": "{tokens} tokens, {speed:.0f} a second, first after {first:.0f} ms",
        "busy": "The answers are still being written.",
        "failed": "An answer failed. Regenerate it, or start a new conversation.",
        "empty": "The question is empty.",
        "nothing_to_regenerate": "There is no answer to regenerate.",
        "nothing_to_judge": "There is nothing to vote on.",
        "bad_settings": "The sampling settings are out of range.",
    },
    "zh-CN": {
        "hint_blind": "两个模型，名称隐藏。提问、阅读、投票；投票后显示名称。",
        "hint_named": "一次提问，阅读所有回答，选出更好的一个。",
        "prompt": "向它们提问……",
        "ask": "提问",
        "stop": "停止",
        "again": "重新生成",
        "new": "新对话",
        "better_a": "A 更好",
        "better_b": "B 更好",
        "best_a": "A 最好",
        "best_b": "B 最好",
        "best_c": "C 最好",
        "best_d": "D 最好",
        "tie": "平局",
        "bad": "都不好",
        "bad_all": "都不好",
        "settings": "采样设置",
        "temperature": "温度",
        "temperature_info": "0 表示总取概率最高的词元",
        "top_p": "Top-p",
        "top_p_info": "只保留累计达到此概率的词元",
        "max_new_tokens": "长度",
        "max_new_tokens_info": "回答的最大词元数",
        "seed": "随机种子",
        "seed_info": "留空则每次随机",
        "system": "系统提示",
        "system_info": "从下一次新对话起生效",
        "waiting": "正在回答……",
        "ready": "哪个回答更好？",
        "start": "",
        "incomplete": "有回答失败。请重新生成，或开始新对话。",
        "pane_failed": "⚠ 此模型未能回答。",
        "saved": "投票已保存：{choice}",
        "saved_talk": "投票已保存：{choice}。它包含多轮对话，仅计入统计，不用于训练。",
        "pace": "{tokens} 个词元，每秒 {speed:.0f} 个，首个 {first:.0f} 毫秒",
        "busy": "回答尚未写完。",
        "failed": "有回答失败。请重新生成，或开始新对话。",
        "empty": "问题为空。",
        "nothing_to_regenerate": "没有可重新生成的回答。",
        "nothing_to_judge": "没有可投票的内容。",
        "bad_settings": "采样设置超出范围。",
    },
}


def language_of(accept_language: str | None) -> str:
    """The catalogue a browser's Accept-Language header asks for first."""
    first = (accept_language or "").split(",")[0].strip().lower()
    return "zh-CN" if first.startswith("zh") else "en"


def vote_key(choice: str, panes: int) -> str:
    """The catalogue key of a vote button."""
    if choice == "tie":
        return "tie"
    if choice == "bad":
        return "bad" if panes == 2 else "bad_all"
    return f"{'better' if panes == 2 else 'best'}_{choice}"
