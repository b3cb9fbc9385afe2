// Sets the theme and the language before the first paint. This is a plain script, because modules run too late.

(() => {
  const read = (name) => {
    try {
      return JSON.parse(localStorage.getItem(`inkstream.${name}`));
    } catch {
      return null;
    }
  };
  const theme = read("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  const language = read("language") ?? (/^zh\b/i.test(navigator.language) ? "zh" : "en");
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
})();
