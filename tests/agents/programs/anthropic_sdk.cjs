// The Anthropic SDK for Node: Messages, streamed, with a calculator for up to four calls.
const Anthropic = require("@anthropic-ai/sdk");
const { calculate, description, parameters, printReward } = require("./calculator.cjs");

async function main() {
  const task = JSON.parse(process.argv[2]);
  const client = new Anthropic({ maxRetries: 0 });
  const tools = [{ name: "calc", description, input_schema: parameters }];
  const messages = [...task.messages];
  for (let turn = 0; turn < 4; turn++) {
    const stream = client.messages.stream({ model: "any", max_tokens: 48, messages, tools });
    const { content } = await stream.finalMessage();
    messages.push({ role: "assistant", content });
    const calls = content.filter((block) => block.type === "tool_use");
    const text = content.map((block) => block.text ?? "").join("");
    if (!calls.length) return printReward(text, task.answer);
    const results = calls.map(({ id, input }) => ({
      type: "tool_result",
      tool_use_id: id,
      content: calculate(input),
    }));
    messages.push({ role: "user", content: results });
  }
  printReward("", task.answer);
}

main();
