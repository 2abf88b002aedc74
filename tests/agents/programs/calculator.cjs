// The tool of the programs here, and their grade: the answer's last number is the right one.
exports.description = "Evaluate an arithmetic expression.";
exports.parameters = {
  type: "object",
  properties: { expression: { type: "string" } },
  required: ["expression"],
};

exports.calculate = ({ expression }) => {
  const read = /^\s*(\d+)\s*([+*])\s*(\d+)\s*$/.exec(expression ?? "");
  if (read === null) return "error: write two numbers with + or * between them";
  const [a, b] = [Number(read[1]), Number(read[3])];
  return String(read[2] === "+" ? a + b : a * b);
};

exports.printReward = (text, answer) => {
  const numbers = text.match(/\d+/g) ?? [];
  console.log(JSON.stringify({ reward: numbers.at(-1) === answer ? 1 : 0 }));
};
