// Browsers start no workers for pages that are opened as files. The search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = (...scripts) => Promise.all(scripts.map((one) => this.load(one)));
      this.loaded = this.load(script);
    }

    load(script) {
      return new Promise((resolve, reject) => {
        const element = this.inside.document.createElement("script");
        Object.assign(element, { src: script, onload: resolve, onerror: reject });
        this.inside.document.documentElement.append(element);
      });
    }

    async postMessage(data) {
      await this.loaded;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
